// Asks the API for administrators, which is beside this page. The token is kept here and nowhere else.

export class Refused extends Error {
  /** status: the HTTP status; 0 if there was no answer. */
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

const LONGEST_MS = 60_000;

/** Gives a function that asks with the token: a path below the API's own, and a query. */
export function asking(token) {
  return async function ask(path, { query = {}, method = "GET", body } = {}) {
    const given = Object.entries(query).filter(([, value]) => value);
    const search = given.length ? `?${new URLSearchParams(given)}` : "";
    let answer, said;
    try {
      answer = await fetch(`admin/v1/${path}${search}`, {
        method,
        headers: { Authorization: `Bearer ${token}`, ...(body && { "Content-Type": "application/json" }) },
        body: body && JSON.stringify(body),
        credentials: "omit",
        cache: "no-store",
        redirect: "error",
        signal: AbortSignal.timeout(LONGEST_MS),
      });
    } catch (problem) {
      throw new Refused(0, problem.name === "TimeoutError" ? "The server took too long" : "The server did not answer");
    }
    try {
      said = await answer.json();
    } catch {
      throw new Refused(answer.status, `The server answered ${answer.status} without JSON`);
    }
    if (!answer.ok) throw new Refused(answer.status, `${said.error} (${answer.status} ${said.errcode})`);
    return said;
  };
}
