/* Asks the server: one call, its faults as one class, pictures sent once. Knows nothing of the page. */

import { fits, image } from "./shapes.js";

/** What went wrong, in the API's own words; `status` is 0 when no answer came. */
export class Fault extends Error {
  constructor({ code, message, field = null, index = null, retryable = false, request_id: requestId = null }, status = 0, retryAfterS = null) {
    super(message);
    Object.assign(this, { code, field, index, retryable, requestId, status, retryAfterS });
  }
}

/** The API of the server that gave this page; the key stays in memory. */
export class Server {
  #key = "";

  get hasKey() {
    return this.#key !== "";
  }

  useKey(key) {
    if (!/^[!-~]+$/.test(key)) throw new Fault({ code: "bad_key", message: "a key is made of printable ASCII characters without spaces", field: "key" });
    this.#key = key;
  }

  address(path) {
    return new URL(path, document.baseURI).href;
  }

  /** The JSON of a 2xx answer, which has at least the parts of `shape`. Throws a Fault, or the AbortError of `signal`. */
  async call(method, path, { body, type, signal, shape = {} } = {}) {
    const headers = { ...(type && { "Content-Type": type }), ...(this.#key && { Authorization: `Bearer ${this.#key}` }) };
    const answer = await reach(this.address(path), { method, body, headers, signal, credentials: "omit", cache: "no-store" });
    const said = await readJson(answer);
    if (!answer.ok) throw faultOf(answer, said);
    if (!fits(said, shape)) throw unreadable(answer, "is not what was asked for");
    return said;
  }

  /** A file of the page's own, as bytes. */
  async blob(path) {
    const answer = await reach(this.address(path), { credentials: "omit" });
    if (!answer.ok) throw faultOf(answer, null);
    return answer.blob();
  }

  post(path, body, shape, signal) {
    return this.call("POST", path, { body: JSON.stringify(body), type: "application/json", shape, signal });
  }

  /** `body` about a picture that the server may have forgotten: then it is sent once more. Throws a Fault. */
  async postAbout(picture, path, body, shape, signal) {
    if (!picture) return this.post(path, body, shape, signal);
    try {
      return await this.post(path, { image: await picture.sent(this), ...body }, shape, signal);
    } catch (error) {
      if (error.code !== "image_unknown") throw error;
      picture.forget();
      return this.post(path, { image: await picture.sent(this), ...body }, shape, signal);
    }
  }
}

/** One picture: its bytes are sent when somebody first needs the id. */
export class Picture {
  #answer = null;
  #sending = null;

  constructor(blob, name) {
    Object.assign(this, { blob, name, url: URL.createObjectURL(blob) });
  }

  /** The id under which the server keeps the bytes. A failed attempt is not kept. */
  async sent(server) {
    return (await this.received(server)).image_id;
  }

  received(server) {
    if (!this.#answer) {
      const sending = new AbortController();
      const answer = server.call("PUT", "images", { body: this.blob, type: "application/octet-stream", shape: image, signal: sending.signal });
      [this.#answer, this.#sending] = [answer, sending];
      answer.then(() => this.#sending === sending && (this.#sending = null), () => this.#answer === answer && this.forget());
    }
    return this.#answer;
  }

  forget() {
    this.#answer = this.#sending = null;
  }

  /** What is still on its way is given up; the next who needs it sends it anew. */
  stop() {
    if (!this.#sending) return;
    this.#sending.abort();
    this.forget();
  }

  close() {
    this.stop();
    URL.revokeObjectURL(this.url);
  }
}

async function reach(url, options) {
  try {
    return await fetch(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault({ code: "unreachable", message: "the server did not answer; it may have stopped, or the network is gone", retryable: true });
  }
}

async function readJson(answer) {
  try {
    return await answer.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw unreadable(answer, "is not JSON");
  }
}

function unreadable(answer, why) {
  const message = `the answer (status ${answer.status}) ${why}; something else may stand before the server`;
  return new Fault({ code: "unreadable_answer", message, retryable: true }, answer.status);
}

function faultOf(answer, said) {
  const error = fits(said?.error, { code: "string", message: "string" }) ? said.error : { code: `status_${answer.status}`, message: `the server answered with status ${answer.status}`, retryable: answer.status >= 500 };
  const seconds = Number.parseInt(answer.headers.get("Retry-After"), 10);
  return new Fault(error, answer.status, Number.isNaN(seconds) ? null : seconds);
}
