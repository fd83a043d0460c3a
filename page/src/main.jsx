// The page for administrators: who may look, and what is looked at.

import { render } from "preact";
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { Act, Actions } from "./actions.jsx";
import { asking } from "./api.js";
import { Event } from "./event.jsx";
import { Room, Rooms, Servers } from "./lists.jsx";
import { Overview } from "./overview.jsx";
import { to } from "./text.jsx";

const VIEWS = { overview: "Overview", rooms: "Rooms", servers: "Servers", event: "An event", actions: "Actions" };

/** What is looked at: the part of the address that the browser sends to nobody. */
function whereabouts() {
  const [path, search] = location.hash.replace(/^#?\/?/, "").split(/\?(.*)/s);
  const query = Object.fromEntries(new URLSearchParams(search));
  try {
    const [view, room] = path.split("/").map(decodeURIComponent);
    return { view, room, query };
  } catch {
    return { query };
  }
}

function App() {
  const [token, setToken] = useState();
  const [why, setWhy] = useState();
  const ask = useMemo(() => {
    const ask = token && asking(token);
    return (
      ask &&
      (async (...args) => {
        try {
          return await ask(...args);
        } catch (error) {
          if (error.status === 401 || error.status === 403) {
            setToken(undefined);
            setWhy(error.message);
          }
          throw error;
        }
      })
    );
  }, [token]);
  function signOut() {
    setWhy(undefined);
    setToken(undefined);
  }
  return ask ? <Signed ask={ask} onOut={signOut} /> : <SignIn why={why} onToken={setToken} />;
}

function SignIn({ why, onToken }) {
  const [said, setSaid] = useState(why);
  async function onSubmit(event) {
    event.preventDefault();
    const token = new FormData(event.currentTarget).get("token").trim();
    // A header takes no other characters.
    if (!/^[\x21-\x7e]+$/.test(token)) return setSaid("This is no access token");
    setSaid("Asking…");
    try {
      await asking(token)("overview");
      onToken(token);
    } catch (error) {
      setSaid(error.message);
    }
  }
  return (
    <main class="sign-in">
      <h1>Sticky events</h1>
      <form onSubmit={onSubmit}>
        <label>
          Access token of a server admin
          <input name="token" type="password" autocomplete="off" required aria-describedby="kept" />
        </label>
        <p id="kept">It is kept in this page's memory only: reload or close the page, and it is gone.</p>
        <button>Sign in</button>
        <p role="alert">{said}</p>
      </form>
    </main>
  );
}

function Signed({ ask, onOut }) {
  const [{ view, room, query }, setWhere] = useState(whereabouts);
  const heading = useRef();
  const known = view === "act" ? "act" : view in VIEWS ? view : "overview";
  const title = room ? "A room" : known === "act" ? "A new action" : VIEWS[known];
  useEffect(() => {
    const onChange = () => setWhere(whereabouts());
    addEventListener("hashchange", onChange);
    return () => removeEventListener("hashchange", onChange);
  }, []);
  useLayoutEffect(() => {
    document.title = `${title} · Sticky events`;
    heading.current.focus();
  }, [known, room]);
  return (
    <>
      <header>
        <nav aria-label="Views">
          {Object.entries(VIEWS).map(([name, text]) => (
            <a key={name} href={to([name])} aria-current={name === known ? "page" : undefined}>
              {text}
            </a>
          ))}
        </nav>
        <button type="button" onClick={onOut}>
          Sign out
        </button>
      </header>
      <main>
        <h1 ref={heading} tabIndex={-1}>
          {title}
        </h1>
        {known === "overview" && <Overview ask={ask} />}
        {known === "rooms" && !room && <Rooms ask={ask} query={query} />}
        {known === "rooms" && room && <Room key={room} ask={ask} roomId={room} />}
        {known === "servers" && <Servers ask={ask} query={query} />}
        {known === "event" && <Event ask={ask} query={query} />}
        {known === "actions" && <Actions ask={ask} />}
        {known === "act" && <Act key={JSON.stringify(query)} ask={ask} query={query} />}
      </main>
    </>
  );
}

render(<App />, document.getElementById("app"));
