// Does one thing on the page as a person would: node browse.mjs WHAT, with what it needs to know as JSON on stdin.
//
// Whatever is done, at the end nothing was asked of anybody else, and the browser has found nothing against the
// Content-Security-Policy.

import assert from "node:assert/strict";
import { mkdtemp, rm } from "node:fs/promises";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import path from "node:path";
import { text } from "node:stream/consumers";

const require = createRequire(new URL("../../page/package.json", import.meta.url));
const { chromium } = require("playwright-core");
const axe = require("axe-core").source;

const FLAGS = [
  ...["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"],
  ...["--disable-component-update", "--disable-sync"],
];
const ROOMS = 10_000;
const A_PAGE = 500;
const LONGEST_TASK_MS = 200;
const PHONE = { width: 360, height: 640 };
const DESK = { width: 1000, height: 720 };

const given = JSON.parse(await text(process.stdin));

async function signIn(page, token = given.token) {
  await page.goto(given.url);
  await page.getByLabel("Access token").fill(token);
  await page.getByRole("button", { name: "Sign in" }).click();
}

async function go(page, name) {
  await page.getByRole("link", { name, exact: true }).click();
  await page.getByRole("heading", { level: 1, name }).waitFor();
}

/** The number on a card of the overview. */
function card(page, name) {
  return page.locator(".cards > div", { hasText: name }).locator("dd");
}

async function shown(locator, expected) {
  await locator.filter({ hasText: expected }).first().waitFor();
}

/** Answers for a server with many rooms. */
async function withManyRooms(page) {
  const asked = [];
  await page.route("**/admin/v1/rooms?*", (route) => {
    const from = Number(new URL(route.request().url()).searchParams.get("from") ?? 0);
    asked.push(from);
    const rooms = Array.from({ length: A_PAGE }, (_, i) => ({
      ...{ room_id: `!${from + i}:example.org`, name: `Room ${from + i}`, alias: null },
      ...{ active: ROOMS - from - i, deferred: i % 3, parked: 0 },
    }));
    const next = from + A_PAGE < ROOMS ? { next: String(from + A_PAGE) } : {};
    return route.fulfill({ json: { now_ms: 1, rooms, ...next } });
  });
  return asked;
}

const WHAT = {
  async sign_in(page) {
    const alert = page.getByRole("alert");
    for (const [token, said] of [
      ["nonsense", "401 M_UNKNOWN_TOKEN"],
      ["not möglich", "no access token"],
      [given.user_token, "403 M_FORBIDDEN"],
    ]) {
      await signIn(page, token);
      await shown(alert, said);
    }
    await signIn(page);
    await page.getByRole("heading", { name: "Overview" }).waitFor();
    const kept = await page.evaluate(() => [localStorage.length, sessionStorage.length, document.cookie]);
    assert.deepEqual([...kept, page.url()], [0, 0, "", given.url]);
    await page.reload();
    await page.getByLabel("Access token").waitFor();
    await signIn(page);
    await go(page, "Rooms");
    await page.getByRole("button", { name: "Sign out" }).click();
    await page.getByLabel("Access token").waitFor();
    assert.equal(await page.getByLabel("Access token").inputValue(), "");
    // What was looked at is looked at again, by one whose token ends meanwhile.
    await page.getByLabel("Access token").fill(given.other_token);
    await page.keyboard.press("Enter");
    await page.getByRole("heading", { name: "Rooms" }).waitFor();
    const headers = { Authorization: `Bearer ${given.other_token}` };
    await fetch(new URL("/_matrix/client/v3/logout", given.url), { method: "POST", headers });
    await page.getByRole("button", { name: "Read again" }).click();
    await shown(alert, "401 M_UNKNOWN_TOKEN");
  },

  /** It updates itself, and says if it cannot. */
  async overview(page) {
    await page.clock.install();
    await signIn(page);
    await shown(card(page, "Deferred"), "1servers: 1");
    await shown(page.getByRole("row", { name: "per_sender" }), "1");
    const before = Number((await card(page, "Sticky now").innerText()).split("\n")[0]);
    const { url, token } = given.send;
    const sent = await fetch(url, { method: "PUT", headers: { Authorization: `Bearer ${token}` }, body: "{}" });
    assert.equal(sent.status, 200);
    await page.clock.runFor(10_000);
    await shown(card(page, "Sticky now"), `${before + 1}rooms`);
    await page.route("**/overview", (route) => route.abort());
    await page.clock.runFor(10_000);
    await shown(page.getByRole("status"), "This is old");
    await page.unroute("**/overview");
    await page.clock.runFor(10_000);
    await shown(page.getByRole("status"), "As it is now");
  },

  /** From the rooms to why an event waits. Every name on the way is hostile. */
  async way(page) {
    await signIn(page);
    await go(page, "Rooms");
    await page.getByRole("link", { name: given.hostile }).click();
    await page.getByRole("heading", { name: "A room" }).waitFor();
    const waiting = page.getByRole("link", { name: "deferred: federation.per_sender" });
    await waiting.click();
    await shown(page.getByLabel("Verdict"), "deferred");
    const steps = page.getByRole("list").filter({ hasText: "received" }).getByRole("listitem");
    assert.deepEqual(
      await steps.locator("b").allInnerTexts(),
      ["received", "staged", "parked", "persisted", "checked", "limited", "delivered", "pushed", "expired"],
    );
    await shown(steps.filter({ hasText: "limited" }), "waiting");
    await shown(page.locator("main"), given.hostile);
    // One that is not here, of a server with such a name.
    await go(page, "An event");
    await page.getByLabel("Event ID").fill(`$${given.hostile}`);
    await page.getByText("If it is not here").click();
    await page.getByLabel("Room ID").fill(given.room_id);
    await page.getByLabel("Sender").fill(`@eve:${given.hostile}`);
    await page.getByRole("button", { name: "Show its way" }).click();
    await shown(page.getByLabel("Verdict"), "not here");
    await shown(page.getByLabel("Possible reason"), given.hostile);
    await go(page, "Servers");
    await page.getByRole("link", { name: given.peer }).waitFor();
    // A link that somebody else has made.
    await page.goto(`${given.url}#/rooms/${encodeURIComponent(given.hostile)}`);
    assert.equal(await page.getByLabel("Access token").count(), 0, "the page was not loaded again");
    await shown(page.locator("main"), given.hostile);
    await page.goto(`${given.url}#/%`);
    await page.getByRole("heading", { name: "Overview" }).waitFor();
    assert.equal(await page.locator("main img, main script, main iframe, main b b").count(), 0);
  },

  /** Characters that nobody sees are shown. */
  async unseen(page) {
    const room = { alias: null, active: 1, deferred: 0, parked: 0 };
    const rooms = [
      { ...room, room_id: "!a\u200bb\u202ec\u0007:example.org", name: "\u3164\u00a0\u2800" },
      { ...room, room_id: "!\u{e0041}ab:example.org", name: "A name, 日本 🎈" },
    ];
    await page.route("**/admin/v1/rooms?*", (route) => route.fulfill({ json: { now_ms: 1, rooms } }));
    await signIn(page);
    await go(page, "Rooms");
    await page.getByRole("link", { name: "A name, 日本 🎈" }).waitFor();
    assert.deepEqual(await page.locator(".entry b").allInnerTexts(), ["\\u3164\\u00a0\\u2800", "A name, 日本 🎈"]);
    assert.deepEqual(await page.locator(".entry code").allInnerTexts(), [
      "!a\\u200bb\\u202ec\\u0007:example.org",
      "!\\U000e0041ab:example.org",
    ]);
  },

  /** What the API says of an event is on the page, and nothing else is said. */
  async why(page) {
    const { event_id, query, answer } = given;
    await page.goto(`${given.url}#/event?${new URLSearchParams({ event_id, ...query })}`);
    await page.getByLabel("Access token").fill(given.token);
    await page.keyboard.press("Enter");
    const verdict = page.getByLabel("Verdict");
    await shown(verdict, answer.verdict.text);
    await shown(verdict, answer.verdict.to_do);
    for (const { text, to_do } of answer.reasons) await shown(page.locator(".verdict", { hasText: text }), to_do);
    const steps = await page.locator(".way > li").all();
    assert.equal(steps.length, answer.steps.length);
    for (const [i, { name, state, text }] of answer.steps.entries()) {
      for (const said of [name, state, text]) await shown(steps[i], said);
    }
    for (const { server, state } of answer.receivers) await shown(page.getByRole("row", { name: server }), state);
  },

  /** Nothing is ordered before the confirmation. */
  async act(page) {
    const orders = [];
    page.on("request", (request) => request.method() !== "GET" && orders.push(request.method()));
    await signIn(page);
    await go(page, "Actions");
    await page.getByRole("link", { name: "A new action…" }).click();
    await page.locator("select[name=kind]").selectOption("hold");
    await page.getByLabel("Server", { exact: true }).fill("<b>elsewhere");
    await page.getByLabel("Reason").fill(given.hostile);
    await page.getByRole("button", { name: "Go on…" }).click();
    const dialog = page.getByRole("dialog");
    await shown(dialog, "<b>elsewhere");
    await page.keyboard.press("Escape");
    await dialog.waitFor({ state: "detached" });
    await page.getByRole("button", { name: "Go on…" }).click();
    await dialog.getByRole("button", { name: "Cancel" }).click();
    await dialog.waitFor({ state: "detached" });
    assert.deepEqual(orders, []);
    await page.getByRole("button", { name: "Go on…" }).click();
    await dialog.getByRole("button", { name: "hold" }).dblclick();
    const action = page.getByRole("listitem").filter({ hasText: given.hostile });
    await shown(action, "It is over in");
    assert.deepEqual(orders, ["POST"]);
    await action.getByRole("button", { name: "End…" }).click();
    await dialog.getByRole("button", { name: "End it" }).click();
    await shown(action, "Ended by");
    assert.deepEqual(orders, ["POST", "DELETE"]);
    assert.equal(await page.locator("main img").count(), 0);
    // What the API refuses is said, and can be mended.
    await page.getByRole("link", { name: "A new action…" }).click();
    await page.locator("select[name=kind]").selectOption("exempt");
    await page.getByRole("button", { name: "Go on…" }).click();
    await dialog.getByRole("button", { name: "exempt" }).click();
    await shown(dialog.getByRole("alert"), "'exempt' needs either 'server' or 'sender'");
    await dialog.getByRole("button", { name: "Cancel" }).click();
    await page.locator("select[name=kind]").selectOption("release");
    await page.getByLabel("Room ID").fill(given.room_id);
    await page.getByRole("button", { name: "Go on…" }).click();
    await dialog.getByRole("button", { name: "release" }).click();
    await shown(page.getByRole("listitem"), given.room_id);
    // From an event of this server to a server that may have lost it.
    await page.goto(`${given.url}#/event?${new URLSearchParams({ event_id: given.own })}`);
    await page.getByRole("row", { name: given.peer }).getByRole("link", { name: "push…" }).click();
    assert.equal(await page.locator("select[name=kind]").inputValue(), "push");
    await page.getByRole("button", { name: "Go on…" }).click();
    await shown(dialog, given.peer);
    await dialog.getByRole("button", { name: "push" }).click();
    await shown(page.getByRole("listitem").filter({ hasText: "push" }), given.peer);
    // The same at once is too soon.
    await page.goBack();
    await page.getByRole("button", { name: "Go on…" }).click();
    await dialog.getByRole("button", { name: "push" }).click();
    await shown(dialog.getByRole("alert"), "429 M_LIMIT_EXCEEDED");
  },

  async keyboard(page) {
    const { keyboard } = page;
    const focused = () => page.locator(":focus").evaluateAll(([element]) => element?.textContent ?? "");
    async function tabTo(text) {
      for (let i = 0; i < 30; i++) {
        if ((await focused()).includes(text)) return;
        await keyboard.press("Tab");
      }
      assert.fail(`Tab does not come to ${text}`);
    }
    await withManyRooms(page);
    await page.goto(given.url);
    await keyboard.press("Tab");
    await keyboard.type(given.token);
    await keyboard.press("Enter");
    await page.getByRole("heading", { name: "Overview" }).waitFor();
    await keyboard.press("Shift+Tab");
    await keyboard.press("Shift+Tab");
    await keyboard.press("Shift+Tab");
    await keyboard.press("Shift+Tab");
    await tabTo("Servers");
    await keyboard.press("Shift+Tab");
    assert.equal(await focused(), "Rooms");
    await keyboard.press("Enter");
    await page.getByRole("link", { name: "Room 0" }).waitFor();
    assert.equal(await focused(), "Rooms", "the heading has the focus");
    await tabTo("Room 0!0:");
    await keyboard.press("ArrowDown");
    await keyboard.press("ArrowDown");
    await keyboard.press("ArrowUp");
    await shown(page.locator(":focus"), "Room 1!1:");
    await keyboard.press("End");
    await shown(page.locator(":focus"), "Room 499!499:");
    // Where nobody looks the focus stays.
    await page.locator(".box").evaluate((box) => (box.scrollTop = 0));
    await page.getByRole("link", { name: "Room 0 !" }).waitFor();
    await shown(page.locator(":focus"), "Room 499!499:");
    await keyboard.press("Home");
    await shown(page.locator(":focus"), "Room 0!0:");
    await page.locator(".box").evaluate((box) => {
      box.scrollTop = 499 * box.querySelector(".entry").offsetHeight;
    });
    await page.getByRole("link", { name: "Room 499 !" }).waitFor();
    await shown(page.locator(":focus"), "Room 0!0:");
    await keyboard.press("PageDown");
    assert.ok(!(await focused()).includes("Room 0!0:"));
    await keyboard.press("Enter");
    await page.getByRole("heading", { name: "A room" }).waitFor();
    await tabTo("release…");
    await keyboard.press("Enter");
    await page.getByRole("heading", { name: "A new action" }).waitFor();
    await tabTo("Go on…");
    await keyboard.press("Enter");
    await page.getByRole("dialog").waitFor();
    assert.equal(await focused(), "Cancel", "what does nothing has the focus");
    await keyboard.press("Enter");
    await page.getByRole("dialog").waitFor({ state: "detached" });
    assert.equal(await focused(), "Go on…");
  },

  async many_rooms(page) {
    const asked = await withManyRooms(page);
    await page.addInitScript(() => {
      globalThis.tasks = [];
      new PerformanceObserver((list) => tasks.push(...list.getEntries().map((task) => task.duration))).observe({
        type: "longtask",
        buffered: true,
      });
    });
    await signIn(page);
    // It sees one.
    await page.evaluate(() => {
      setTimeout(() => {
        const end = performance.now() + 100;
        while (performance.now() < end);
      });
    });
    await page.waitForFunction(() => tasks.some((duration) => duration >= 100));
    await page.evaluate(() => (tasks.length = 0));
    await go(page, "Rooms");
    const last = page.getByRole("link", { name: `Room ${ROOMS - 1} !` });
    await page.getByRole("link", { name: "Room 0 !" }).waitFor();
    await page.locator(".box").hover();
    // As fast as it can: further each time, until there is no more.
    let turns = 0;
    while (!(await last.count())) {
      await page.mouse.wheel(0, 30_000);
      assert.ok(turns++ < 1_000, "it comes to an end");
    }
    assert.deepEqual(asked, [...Array(ROOMS / A_PAGE).keys()].map((i) => i * A_PAGE), "each page is asked for once");
    assert.ok((await page.getByRole("listitem").count()) < 60, "only what is seen is drawn");
    for (let i = 0; i < 40; i++) await page.mouse.wheel(0, i % 2 ? -20_000 : 11_111);
    await page.keyboard.press("Tab");
    const tasks = await page.evaluate(() => tasks);
    const longest = Math.max(0, ...tasks);
    assert.ok(longest < 4 * LONGEST_TASK_MS, `a task took ${longest} ms`);
    return { longest_task_ms: longest };
  },

  /** axe-core finds nothing serious, in dark and light; a phone needs no sideways scrolling. */
  async look(page) {
    await page.addInitScript(axe);
    const found = [];
    async function take(name) {
      const file = path.join(given.pictures, `page-${name}.png`);
      await page.screenshot({ path: file, fullPage: name === "event" });
    }
    async function look(name, picture) {
      for (const colorScheme of ["light", "dark"]) {
        await page.emulateMedia({ colorScheme });
        const { violations, passes } = await page.evaluate(() => globalThis.axe.run());
        assert.ok(passes.some(({ id }) => id === "color-contrast"), "contrast was looked at");
        for (const { id, impact, nodes } of violations) {
          if (["serious", "critical"].includes(impact)) found.push(`${name}, ${colorScheme}: ${id} ${nodes[0].html}`);
        }
        if (picture === colorScheme) await take(name);
      }
      await page.setViewportSize(PHONE);
      const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
      assert.ok(wide <= 0, `${name} is ${wide} px too wide for a phone`);
      if (picture === "phone") await take(name);
      await page.setViewportSize(DESK);
    }
    await page.goto(given.url);
    await page.getByLabel("Access token").waitFor();
    await look("sign-in");
    await signIn(page);
    await page.getByText("As it is now").waitFor();
    await look("overview", "light");
    await go(page, "Rooms");
    await page.getByRole("link", { name: given.hostile }).waitFor();
    await look("rooms", "phone");
    await page.getByRole("link", { name: given.hostile }).click();
    await page.getByRole("link", { name: "deferred" }).waitFor();
    await look("room");
    await page.getByRole("link", { name: "deferred" }).click();
    await page.getByRole("heading", { name: "Its way" }).waitFor();
    await look("event", "dark");
    await go(page, "Servers");
    await page.getByRole("link", { name: given.peer }).waitFor();
    await look("servers");
    await page.getByRole("link", { name: given.peer }).click();
    await page.getByRole("button", { name: "Go on…" }).click();
    await page.getByRole("dialog").waitFor();
    await look("confirmation", "light");
    await page.keyboard.press("Escape");
    await go(page, "Actions");
    await look("actions");
    assert.deepEqual(found, []);
  },
};

const folder = await mkdtemp(path.join(tmpdir(), "page-"));
const context = await chromium.launchPersistentContext(folder, {
  ...{ executablePath: given.chromium, args: FLAGS, headless: true, viewport: DESK, timeout: 60_000 },
});
try {
  const page = context.pages()[0] ?? (await context.newPage());
  page.setDefaultTimeout(20_000);
  const wrong = [];
  context.on("request", (request) => {
    if (!request.url().startsWith(given.url)) wrong.push(`asked for ${request.url()}`);
  });
  page.on("pageerror", (error) => wrong.push(String(error)));
  page.on("dialog", (dialog) => wrong.push(dialog.message()));
  page.on("console", (message) => {
    // A refused token is said there as well.
    const isExpected = message.text().startsWith("Failed to load resource");
    if (["error", "warning"].includes(message.type()) && !isExpected) wrong.push(message.text());
  });
  const result = await WHAT[process.argv[2]](page);
  assert.deepEqual(wrong, []);
  console.log(JSON.stringify(result ?? {}));
} finally {
  await context.close();
  await rm(folder, { recursive: true, force: true });
}
