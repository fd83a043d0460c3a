// How much is sticky, and how much waits. It asks again by itself while somebody looks.

import { useEffect, useState } from "preact/hooks";
import { Name, When, to } from "./text.jsx";

const EVERY_MS = 10_000;

export function Overview({ ask }) {
  const [found, setFound] = useState();
  const [error, setError] = useState();
  useEffect(() => {
    let isBusy = false;
    async function look() {
      if (document.hidden || isBusy) return;
      isBusy = true;
      try {
        setFound(await ask("overview"));
        setError(undefined);
      } catch (problem) {
        setError(problem);
      }
      isBusy = false;
    }
    look();
    const timer = setInterval(look, EVERY_MS);
    document.addEventListener("visibilitychange", look);
    return () => {
      clearInterval(timer);
      document.removeEventListener("visibilitychange", look);
    };
  }, [ask]);

  const { now_ms: now, active, staged, backlog, deferred, parked, newcomers, actions } = found ?? {};
  return (
    <>
      <p role="status">
        {error
          ? `This is old: ${error.message}`
          : found
            ? `As it is now, read every ${EVERY_MS / 1_000} seconds`
            : "Reading…"}
      </p>
      {found && (
        <>
          <p>
            <Name>{found.server_name}</Name>. Limits for other servers: {found.limits.mode}.
          </p>
          <dl class="cards">
            <Card name="Sticky now" href={to(["rooms"])}>
              {number(active.events, found)}
              <small>rooms: {number(active.rooms, found)}</small>
            </Card>
            <Card name="Deferred" href={to(["rooms"], { order_by: "deferred" })}>
              {deferred ? number(deferred.events, found) : "not recorded"}
              {deferred && <small>servers: {number(deferred.servers, found)}</small>}
            </Card>
            <Card name="Parked" href={to(["rooms"], { order_by: "parked" })}>
              {parked ? number(parked.pdus, found) : "not recorded"}
            </Card>
            <Card name="Staged">
              {number(staged.pdus, found)}
              {staged.oldest_ms && (
                <small>
                  the oldest <When ms={staged.oldest_ms} now={now} />
                </small>
              )}
            </Card>
            <Card name="Newcomers that may lack something" href={to(["servers"], { order_by: "newcomer" })}>
              {newcomers ? number(newcomers.open, found) : "not recorded"}
              {newcomers?.oldest_open_ms && (
                <small>
                  the oldest <When ms={newcomers.oldest_open_ms} now={now} />
                </small>
              )}
            </Card>
            <Card name="Servers that lack something" href={to(["servers"], { order_by: "lacking" })}>
              {number(backlog.servers, found)}
              <small>by Synapse's backlog</small>
            </Card>
            <Card name="Actions in force" href={to(["actions"])}>
              {actions ? number(actions.in_force, found) : "not recorded"}
            </Card>
          </dl>
          <h2>What waits, and why</h2>
          <Reasons name="Deferred, by the limit that it is past" of={deferred?.by_limit} />
          <Reasons name="Parked, by the reason" of={parked?.by_reason} />
        </>
      )}
    </>
  );
}

function number(count, { counted_up_to: most }) {
  return count >= most ? `${most.toLocaleString()} or more` : count.toLocaleString();
}

function Card({ name, href, children }) {
  return (
    <div>
      <dt>{href ? <a href={href}>{name}</a> : name}</dt>
      <dd>{children}</dd>
    </div>
  );
}

function Reasons({ name, of }) {
  const rows = Object.entries(of ?? {}).sort(([, a], [, b]) => b - a);
  if (!rows.length) return <p>{name}: nothing.</p>;
  return (
    <table>
      <caption>{name}</caption>
      <tbody>
        {rows.map(([reason, count]) => (
          <tr key={reason}>
            <th scope="row">
              <Name>{reason}</Name>
            </th>
            <td>{count.toLocaleString()}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}
