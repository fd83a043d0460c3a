// One event's way, and why it has not been delivered.

import { useEffect, useState } from "preact/hooks";
import { Name, When, printable, to } from "./text.jsx";

const MARKS = { done: "✓", waiting: "…", failed: "✗", none: "–", "not recorded": "?" };

export function Event({ ask, query }) {
  const { event_id: eventId, room_id: roomId, sender } = query;
  const [state, setState] = useState({});
  useEffect(() => {
    let isOver = false;
    setState({ isBusy: Boolean(eventId) });
    if (!eventId) return;
    ask(`events/${encodeURIComponent(eventId)}`, { query: { room_id: roomId, sender, limit: 500 } }).then(
      (found) => isOver || setState({ found }),
      (error) => isOver || setState({ error }),
    );
    return () => {
      isOver = true;
    };
  }, [ask, eventId, roomId, sender]);

  function onSubmit(event) {
    event.preventDefault();
    const given = Object.fromEntries(new FormData(event.currentTarget));
    for (const name in given) given[name] = given[name].trim();
    location.hash = to(["event"], given);
  }
  return (
    <>
      <form onSubmit={onSubmit} key={JSON.stringify(query)}>
        <Field name="event_id" label="Event ID" value={eventId} required />
        <details open={state.found?.verdict.code === "not_here"}>
          <summary>If it is not here: of which room and sender?</summary>
          <Field name="room_id" label="Room ID" value={roomId} />
          <Field name="sender" label="Sender" value={sender} />
        </details>
        <button>Show its way</button>
      </form>
      <p role="status">{state.isBusy ? "Reading…" : state.error?.message}</p>
      {state.found && <Found found={state.found} />}
    </>
  );
}

function Field({ name, label, value, required }) {
  return (
    <label>
      {label}
      <input
        name={name}
        defaultValue={value}
        required={required}
        autocomplete="off"
        spellcheck={false}
        maxLength={255}
      />
    </label>
  );
}

function Found({ found }) {
  const { now_ms: now, verdict, reasons, steps, receivers } = found;
  return (
    <>
      <section aria-label="Verdict" class="verdict">
        <h2>{verdict.code.replaceAll("_", " ")}</h2>
        <p>
          <Name>{verdict.text}</Name>
        </p>
        <p>
          <Name>{verdict.to_do}</Name>
        </p>
      </section>
      {reasons.filter(({ text }) => text !== verdict.text).map((reason, i) => (
        <section key={i} aria-label="Possible reason" class="verdict">
          <h3>{reason.code.replaceAll("_", " ")}</h3>
          <p>
            <Name>{reason.text}</Name>
          </p>
          <p>
            <Name>{reason.to_do}</Name>
          </p>
        </section>
      ))}
      {found.room_id && (
        <p>
          <Name>{found.type}</Name> by <Name>{found.sender}</Name> in{" "}
          <a href={to(["rooms", found.room_id])}>
            <Name>{found.room_id}</Name>
          </a>
          {verdict.code === "deferred" && (
            <>
              {". "}
              <a href={to(["act"], { kind: "release", room_id: found.room_id, sender: found.sender })}>
                Release what waits of this sender…
              </a>
            </>
          )}
        </p>
      )}
      <h2>Its way</h2>
      <ol class="way">
        {steps.map((step) => (
          <li key={step.name} class={step.state.replace(" ", "-")}>
            <span class="mark" aria-hidden="true">
              {MARKS[step.state]}
            </span>
            <div>
              <b>{step.name}</b> <small>{step.state}</small>{" "}
              {step.at_ms !== null && <When ms={step.at_ms} now={now} />}
              <p>
                <Name>{step.text}</Name>
              </p>
              <Details of={step.details} now={now} />
            </div>
          </li>
        ))}
      </ol>
      {receivers.length > 0 && <Receivers found={found} />}
    </>
  );
}

function Details({ of, now }) {
  const entries = Object.entries(of);
  if (!entries.length) return null;
  return (
    <dl>
      {entries.map(([name, value]) => (
        <div key={name}>
          <dt>{printable(name.replace(/_ms$/, "").replaceAll("_", " "))}</dt>
          <dd>
            {name.endsWith("_ms") && typeof value === "number" ? (
              <When ms={value} now={now} />
            ) : (
              <Name>{plain(value)}</Name>
            )}
          </dd>
        </div>
      ))}
    </dl>
  );
}

function plain(value) {
  if (value === null || typeof value !== "object") return value;
  if (Array.isArray(value)) return value.join(", ");
  return Object.entries(value).map(([name, count]) => `${name}: ${count}`).join(", ");
}

function Receivers({ found: { room_id, receivers, receivers_total: total, now_ms: now } }) {
  return (
    <table>
      <caption>
        Other servers in the room: {total}
        {receivers.length < total && `, the first ${receivers.length} of them`}
      </caption>
      <tbody>
        {receivers.map(({ server, state, failing_since_ms: since, next_try_ms: next }) => (
          <tr key={server}>
            <th scope="row">
              <Name>{server}</Name>
            </th>
            <td>
              {state}
              {since !== null && (
                <>
                  , since <When ms={since} now={now} />
                </>
              )}
              {next !== null && (
                <>
                  , tried next <When ms={next} now={now} />
                </>
              )}
            </td>
            <td>
              <a href={to(["act"], { kind: "push", room_id, server })}>push…</a>
            </td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}
