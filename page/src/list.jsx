// Long lists: read page by page, and drawn only where they are looked at.

import { useCallback, useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";

const A_PAGE = 500;
const MOST = 20_000; // entries that are kept here
const SPARE = 8; // entries drawn above and below what is seen
const HEIGHT = 4 * parseFloat(getComputedStyle(document.documentElement).fontSize); // px, as in page.css

/** The entries of one of the API's lists: `more` reads the next page, `again` begins anew. */
export function usePages(ask, path, what, query = {}) {
  const key = JSON.stringify([path, query]);
  const begun = useRef({ key: null });
  const [state, setState] = useState({ rows: [] });
  const more = useCallback(async () => {
    const mine = begun.current;
    if (mine.isBusy || mine.isOver) return;
    mine.isBusy = true;
    try {
      const answer = await ask(path, { query: { limit: A_PAGE, ...query, from: mine.next } });
      if (begun.current !== mine) return;
      mine.rows = mine.rows.concat(answer[what]);
      mine.next = answer.next;
      mine.isOver = !answer.next || mine.rows.length >= MOST;
      setState({ answer, rows: mine.rows, isOver: mine.isOver, isCut: mine.isOver && Boolean(answer.next) });
    } catch (error) {
      mine.isOver = true; // until somebody asks again
      if (begun.current === mine) setState((state) => ({ ...state, error, isOver: true }));
    } finally {
      mine.isBusy = false;
    }
  }, [ask, key]);
  const again = useCallback(() => {
    begun.current = { key, rows: [] };
    setState({ rows: [] });
    more();
  }, [key, more]);
  useEffect(again, [again]);
  return { ...state, more, again };
}

/** Said above and below a list. */
export function Said({ pages, children }) {
  const { rows, error, isOver, isCut, again } = pages;
  const number = rows.length.toLocaleString();
  const count = isOver ? `${number} in all` : `${number}, and more as you scroll`;
  return (
    <div class="said">
      <p role="status">
        {error ? `Not all could be read: ${error.message}` : pages.answer ? count : "Reading…"}
        {isCut && " (the list ends here: sort it in another way)"}
      </p>
      {children}
      <button type="button" onClick={again}>
        Read again
      </button>
    </div>
  );
}

/** A list of links, one tab stop: arrows, page and end keys go through it.
 *
 * href: gives the address of an entry. children: gives what is shown of one.
 */
export function List({ label, pages, href, children }) {
  const { rows, more, isOver } = pages;
  const box = useRef();
  const isWanted = useRef(false);
  const [top, setTop] = useState(0);
  const [size, setSize] = useState(600);
  const [at, setAt] = useState(0);
  const current = Math.min(at, rows.length - 1);
  const first = Math.max(0, Math.floor(top / HEIGHT) - SPARE);
  const last = Math.min(rows.length, Math.ceil((top + size) / HEIGHT) + SPARE);

  useEffect(() => {
    const seen = new ResizeObserver(() => box.current && setSize(box.current.clientHeight));
    seen.observe(box.current);
    return () => seen.disconnect();
  }, []);
  useEffect(() => {
    if (rows.length && last >= rows.length - SPARE) more();
  }, [last, rows.length, more]);
  useLayoutEffect(() => {
    if (isWanted.current) box.current.querySelector(`[data-at="${current}"]`)?.focus();
    isWanted.current = false;
  });

  function onKeyDown(event) {
    const aPage = Math.max(1, Math.floor(size / HEIGHT) - 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: aPage, PageUp: -aPage, Home: -rows.length, End: rows.length };
    const move = moves[event.key];
    if (!move || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    isWanted.current = true;
    setAt(Math.min(rows.length - 1, Math.max(0, current + move)));
  }

  // The current one is always drawn, so that the focus stays.
  const drawn = [];
  if (current >= 0 && current < first) drawn.push(current);
  for (let i = first; i < last; i++) drawn.push(i);
  if (current >= last) drawn.push(current);
  return (
    <div class="box" ref={box} onScroll={(event) => setTop(event.currentTarget.scrollTop)} onKeyDown={onKeyDown}>
      <div role="list" aria-label={label} style={{ height: `${rows.length * HEIGHT}px` }}>
        {drawn.map((i) => (
          <div
            key={i}
            role="listitem"
            class="entry"
            aria-posinset={i + 1}
            aria-setsize={isOver ? rows.length : -1}
            style={{ top: `${i * HEIGHT}px` }}
          >
            <a href={href(rows[i])} data-at={i} tabIndex={i === current ? 0 : -1} onFocus={() => setAt(i)}>
              {children(rows[i])}
            </a>
          </div>
        ))}
      </div>
    </div>
  );
}
