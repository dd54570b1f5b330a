// Asks the server for some JSON every few seconds, with the key if it wants one, and says how it went. Knows no run.
import { at, put } from "./words.js";

const EVERY_MS = 3000;
const say = (text) => put(at("state"), text);

export function poll(address, { show, missing }) {
  // `show` gets each answer; `missing` says what a 404 means.
  let apiKey = ""; // in memory and nowhere else
  let timer = 0;

  async function ask() {
    const answer = await fetch(address, { headers: { Accept: "application/json", ...(apiKey ? { Authorization: `Bearer ${apiKey}` } : {}) } });
    at("unlock").hidden = answer.status !== 401;
    if (answer.ok) {
      show(await answer.json());
      return say("");
    }
    if (answer.status === 401) {
      put(at("headline"), apiKey ? "That key does not open this server." : "The numbers are behind the server's key.");
      apiKey = "";
      clearTimeout(timer);
      timer = -1; // until a key is given
      return say("");
    }
    return say(answer.status === 404 ? missing() : `The server answers ${answer.status}; asking again.`);
  }

  async function refresh() {
    timer = 0;
    try {
      if (!document.hidden) await ask();
    } catch (error) {
      say(`The server does not answer (${error.message}); asking again.`);
    }
    if (timer === 0) timer = setTimeout(refresh, EVERY_MS);
  }

  at("unlock").addEventListener("submit", (event) => {
    event.preventDefault();
    apiKey = at("key").value.trim();
    at("key").value = "";
    refresh();
  });
  document.addEventListener("visibilitychange", () => {
    if (document.hidden || timer < 0) return;
    clearTimeout(timer);
    refresh();
  });
  refresh();
}
