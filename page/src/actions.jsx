// What administrators have ordered, and a new order: nothing is done without a confirmation.

import { useEffect, useRef, useState } from "preact/hooks";
import { usePages } from "./list.jsx";
import { Name, When, to } from "./text.jsx";

// What each does, what it can be about, and whether it lasts. The API says what it needs.
const KINDS = {
  hold: {
    text: "The server's sticky events are persisted, and wait until this is over.",
    fields: ["server"],
    lasts: true,
  },
  exempt: {
    text: "The server is without limits, or the user without per_sender.",
    fields: ["server", "sender"],
    lasts: true,
  },
  release: {
    text: "What waits now is delivered at once, whatever the limits.",
    fields: ["server", "room_id", "sender"],
  },
  discard: {
    text: "What waits now is never sticky. Nobody can undo that.",
    fields: ["server", "room_id", "sender"],
  },
  push: {
    text: "The server is sent this server's own sticky events of the room once more, also those that it has confirmed.",
    fields: ["server", "room_id"],
  },
};
const LABELS = { server: "Server", room_id: "Room ID", sender: "User ID" };
const DURATIONS = [
  ["10 minutes", 600_000],
  ["1 hour", 3_600_000],
  ["6 hours", 21_600_000],
  ["1 day", 86_400_000],
  ["7 days", 604_800_000],
];
const USUAL_MS = 3_600_000;

export function Act({ ask, query }) {
  const [kind, setKind] = useState(query.kind in KINDS ? query.kind : "release");
  const [order, setOrder] = useState();
  const { text, fields, lasts } = KINDS[kind];

  function onSubmit(event) {
    event.preventDefault();
    const given = Object.entries(Object.fromEntries(new FormData(event.currentTarget)));
    const body = Object.fromEntries(given.map(([name, value]) => [name, value.trim()]).filter(([, value]) => value));
    if (body.for_ms) body.for_ms = Number(body.for_ms);
    setOrder(body);
  }
  return (
    <>
      <form onSubmit={onSubmit}>
        <label>
          Action
          <select name="kind" value={kind} onChange={(event) => setKind(event.currentTarget.value)}>
            {Object.keys(KINDS).map((name) => (
              <option key={name}>{name}</option>
            ))}
          </select>
        </label>
        <p>{text}</p>
        {fields.map((name) => (
          <label key={name}>
            {LABELS[name]}
            <input name={name} defaultValue={query[name]} autocomplete="off" spellcheck={false} maxLength={255} />
          </label>
        ))}
        {lasts && (
          <label>
            For
            <select name="for_ms">
              {DURATIONS.map(([name, ms]) => (
                <option key={ms} value={String(ms)} selected={ms === USUAL_MS}>
                  {name}
                </option>
              ))}
            </select>
          </label>
        )}
        <label>
          Reason, for other administrators
          <input name="reason" autocomplete="off" maxLength={500} />
        </label>
        <button>Go on…</button>
      </form>
      {order && (
        <Confirm
          title={`${order.kind}?`}
          confirm={order.kind}
          run={() => ask("actions", { method: "POST", body: order })}
          onDone={() => (location.hash = to(["actions"]))}
          onCancel={() => setOrder(undefined)}
        >
          <p>{KINDS[order.kind].text}</p>
          <dl>
            {Object.keys(LABELS)
              .filter((name) => order[name])
              .map((name) => (
                <div key={name}>
                  <dt>{LABELS[name]}</dt>
                  <dd>
                    <Name>{order[name]}</Name>
                  </dd>
                </div>
              ))}
            {order.for_ms && (
              <div>
                <dt>For</dt>
                <dd>{DURATIONS.find(([, ms]) => ms === order.for_ms)[0]}</dd>
              </div>
            )}
          </dl>
        </Confirm>
      )}
    </>
  );
}

export function Actions({ ask }) {
  const pages = usePages(ask, "actions", "actions", { limit: 100 });
  const [ending, setEnding] = useState();
  const now = pages.answer?.now_ms;
  return (
    <>
      <p>
        <a href={to(["act"])}>A new action…</a>
      </p>
      <p role="status">{pages.error ? pages.error.message : pages.answer ? "" : "Reading…"}</p>
      <ul class="actions">
        {pages.rows.map((action) => (
          <li key={action.action_id}>
            <div>
              <b>{action.kind}</b>{" "}
              <Name>{[action.server, action.room_id, action.sender].filter(Boolean).join(", ")}</Name>
              <p>
                <Name>{action.made_by}</Name>, <When ms={action.made_ms} now={now} />.{" "}
                {action.in_force ? (
                  <>
                    It is over <When ms={action.until_ms} now={now} />.
                  </>
                ) : (
                  <>
                    {action.kind === "push" && action.ended_ms !== null && action.ended_by === null
                      ? "Begun: the server is sent what is sticky."
                      : "Over."}
                    {action.ended_by && (
                      <>
                        {" Ended by "}
                        <Name>{action.ended_by}</Name>
                      </>
                    )}
                  </>
                )}{" "}
                <Name>{action.reason}</Name>
              </p>
            </div>
            {action.in_force && (
              <button type="button" onClick={() => setEnding(action)}>
                End…
              </button>
            )}
          </li>
        ))}
      </ul>
      {pages.answer && !pages.rows.length && <p>Nothing was ordered yet.</p>}
      {pages.answer && !pages.isOver && (
        <button type="button" onClick={pages.more}>
          More
        </button>
      )}
      {ending && (
        <Confirm
          title={`End this ${ending.kind}?`}
          confirm="End it"
          run={() => ask(`actions/${encodeURIComponent(ending.action_id)}`, { method: "DELETE" })}
          onDone={() => {
            setEnding(undefined);
            pages.again();
          }}
          onCancel={() => setEnding(undefined)}
        >
          <p>
            <Name>{[ending.server, ending.room_id, ending.sender].filter(Boolean).join(", ")}</Name>
          </p>
        </Confirm>
      )}
    </>
  );
}

function Confirm({ title, confirm, run, onDone, onCancel, children }) {
  const dialog = useRef();
  const [error, setError] = useState();
  const [isBusy, setIsBusy] = useState(false);
  useEffect(() => dialog.current.showModal(), []);
  async function go() {
    setIsBusy(true);
    try {
      await run();
      onDone();
    } catch (problem) {
      setError(problem);
      setIsBusy(false);
    }
  }
  return (
    <dialog ref={dialog} aria-labelledby="confirm" onClose={onCancel}>
      <h2 id="confirm">{title}</h2>
      {children}
      <p role="alert">{error?.message}</p>
      <div class="buttons">
        <button type="button" onClick={() => dialog.current.close()}>
          Cancel
        </button>
        <button type="button" class="go" disabled={isBusy} onClick={go}>
          {confirm}
        </button>
      </div>
    </dialog>
  );
}
