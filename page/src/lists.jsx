// Rooms, servers, and the events of one room.

import { List, Said, usePages } from "./list.jsx";
import { Name, When, counts, to } from "./text.jsx";

const OF_ROOMS = ["active", "deferred", "parked"];
const OF_SERVERS = [...OF_ROOMS, "lacking", "newcomer"];

function Order({ by, names, where }) {
  return (
    <label>
      Sorted by{" "}
      <select value={by} onChange={(event) => location.replace(to(where, { order_by: event.currentTarget.value }))}>
        {[...names, "name"].map((name) => (
          <option key={name}>{name}</option>
        ))}
      </select>
    </label>
  );
}

function order(query, names) {
  return [...names, "name"].includes(query.order_by) ? query.order_by : "active";
}

export function Rooms({ ask, query }) {
  const by = order(query, OF_ROOMS);
  const pages = usePages(ask, "rooms", "rooms", { order_by: by });
  return (
    <>
      <Said pages={pages}>
        <Order by={by} names={OF_ROOMS} where={["rooms"]} />
      </Said>
      <List key={by} label="Rooms" pages={pages} href={(room) => to(["rooms", room.room_id])}>
        {(room) => (
          <>
            <b>
              <Name>{room.name || room.alias || "(no name)"}</Name>
            </b>
            <code>
              <Name>{room.room_id}</Name>
            </code>
            <span>{counts(room, OF_ROOMS)}</span>
          </>
        )}
      </List>
    </>
  );
}

export function Servers({ ask, query }) {
  const by = order(query, OF_SERVERS);
  const pages = usePages(ask, "servers", "servers", { order_by: by });
  const now = pages.answer?.now_ms;
  return (
    <>
      <Said pages={pages}>
        <Order by={by} names={OF_SERVERS} where={["servers"]} />
      </Said>
      <p>
        <i>lacking</i> and <i>newcomer</i> are numbers of rooms. A link leads to the actions on the server.
        {pages.answer && <Lately of={pages.answer.lately} now={now} />}
      </p>
      <List
        key={by}
        label="Servers"
        pages={pages}
        href={(server) => to(["act"], { kind: "hold", server: server.server })}
      >
        {(server) => (
          <>
            <b>
              <Name>{server.server}</Name>
            </b>
            <span>
              {server.is_refused && "refused (429) now. "}
              {["refused", "deferred"].map((what) => late(what, server[`${what}_lately`]))}
              {server.failing_since_ms !== null && (
                <>
                  not reached since <When ms={server.failing_since_ms} now={now} />.{" "}
                </>
              )}
            </span>
            <span>{counts(server, OF_SERVERS)}</span>
          </>
        )}
      </List>
    </>
  );
}

/** How often its events were refused or deferred of late, by limit. */
function late(what, by) {
  const counts = typeof by === "string" ? [] : Object.entries(by);
  return counts.length > 0 && `${what} of late: ${counts.map(([limit, count]) => `${count} (${limit})`).join(", ")}. `;
}

/** What the process that answers knows of refusals, also of servers that are in no list. */
function Lately({ of: { process, since_ms, most_refused }, now }) {
  return (
    <>
      {" "}
      <i>Of late</i> is since <When ms={since_ms} now={now} />, as far as the process <Name>{process}</Name> knows.{" "}
      {typeof most_refused === "string" ? (
        "That process refuses nothing: another one, which is sent events, knows of refusals."
      ) : (
        <>
          Refused most:{" "}
          <Name>{most_refused.map(({ server, events }) => `${server} (${events})`).join(", ") || "nobody"}</Name>.
        </>
      )}
    </>
  );
}

export function Room({ ask, roomId }) {
  const pages = usePages(ask, `rooms/${encodeURIComponent(roomId)}/events`, "events");
  const now = pages.answer?.now_ms;
  return (
    <>
      <p>
        <code>
          <Name>{roomId}</Name>
        </code>
      </p>
      <nav aria-label="Actions on this room">
        {["release", "discard", "push"].map((kind) => (
          <a key={kind} href={to(["act"], { kind, room_id: roomId })}>
            {kind}…
          </a>
        ))}
      </nav>
      <Said pages={pages} />
      <List
        label="Events"
        pages={pages}
        href={(event) => to(["event"], { event_id: event.event_id, room_id: roomId, sender: event.sender })}
      >
        {(event) => (
          <>
            <b>
              <Name>{event.sender ?? "not recorded"}</Name>
            </b>
            <code>
              <Name>{event.type ?? "not recorded"}</Name>
            </code>
            <span>
              {event.state}
              {event.why && (
                <>
                  : <Name>{event.why}</Name>
                </>
              )}
              , ends <When ms={event.ends_ms} now={now} />
            </span>
          </>
        )}
      </List>
    </>
  );
}
