// What others have chosen, and times. Preact makes text of text: nothing here is ever HTML.

const LONGEST = 1_000; // more than an ID or what the API says
// What nobody sees: control characters, those that change the direction of text, blanks other than the space, and
// characters that are shown as nothing.
const INVISIBLE = /[\p{C}\p{Default_Ignorable_Code_Point}\u2800]|(?! )\p{Z}/gu;

/** A character as its number: "\u200b". */
function escaped(character) {
  const number = character.codePointAt(0);
  const [letter, digits] = number < 0x10000 ? ["u", 4] : ["U", 8];
  return `\\${letter}${number.toString(16).padStart(digits, "0")}`;
}

/** The text, with what could hide something made visible, and not longer than it may be. */
export function printable(text) {
  const all = String(text);
  const shown = all.slice(0, LONGEST).replace(INVISIBLE, escaped);
  return all.length > LONGEST ? `${shown}…` : shown;
}

/** A name or an ID that somebody else has chosen. */
export function Name({ children }) {
  return <bdi>{printable(children)}</bdi>;
}

const STEPS = [
  [86_400_000, "d"],
  [3_600_000, "h"],
  [60_000, "min"],
  [1_000, "s"],
];

/** How long: "5 min". */
export function duration(ms) {
  const [unit, name] = STEPS.find(([step]) => ms >= step) ?? STEPS.at(-1);
  return `${Math.round(ms / unit)} ${name}`;
}

/** A time in ms since the epoch, beside the server's own. */
export function When({ ms, now }) {
  const date = new Date(ms);
  if (Number.isNaN(date.getTime())) return <>{String(ms)}</>;
  const said = ms > now ? `in ${duration(ms - now)}` : `${duration(now - ms)} ago`;
  return (
    <time dateTime={date.toISOString()} title={date.toLocaleString()}>
      {said}
    </time>
  );
}

/** "3 active, 1 deferred": the counts that are not 0. */
export function counts(of, names) {
  const some = names.filter((name) => of[name]).map((name) => `${of[name]} ${name}`);
  return some.join(", ") || "nothing now";
}

/** A link's address on this page: parts of a path, and a query. */
export function to(parts, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value);
  const search = given.length ? `?${new URLSearchParams(given)}` : "";
  return `#/${parts.map(encodeURIComponent).join("/")}${search}`;
}
