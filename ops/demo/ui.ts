/** What both screens of the demo share: elements, the banner, the news for screen readers, the relay's health. */
import type { CloseCode } from "../../server.ts";
import type { Party, Status } from "./party.ts";

const LONG = 60; // characters of a question that fills more than two lines of a television

/** Close codes as the relay names them, written out here because its code has no business in a browser. */
export const Close = {
  TOO_MANY_ATTEMPTS: 1008,
  RESTARTING: 1012,
  SERVER_FULL: 1013,
  REPLACED: 4000,
  ROOM_CLOSED: 4001,
  KICKED: 4002,
} satisfies Partial<typeof CloseCode>;

/** A screen of the page; `close` stops all that it does. */
export type Screen = { close(): void };

/** What the demo's server says: where the relay is, and the address under which phones reach this page. */
export type Place = { relay: string; page: string };

/** An element that index.html has. */
export function byId<T extends HTMLElement = HTMLElement>(id: string): T {
  return document.getElementById(id) as T;
}

/** Sets text where it changes: screen readers repeat what is set again. */
export function setText(element: Element, text: string): void {
  if (element.textContent !== text) element.textContent = text;
}

/** Shows the question, smaller where it is long. */
export function setQuestion(element: Element, question: string): void {
  setText(element, question);
  element.classList.toggle("long", question.length > LONG);
}

/** Says something to screen readers. */
export function announce(text: string): void {
  setText(byId("news"), text);
}

/** Shows a banner with a button, or none. */
export function banner(text: string, action?: { label: string; run: () => void }): void {
  byId("banner").hidden = text === "";
  setText(byId("bannerText"), text);
  const button = byId<HTMLButtonElement>("bannerButton");
  button.hidden = action === undefined;
  setText(button, action?.label ?? "");
  button.onclick = action?.run ?? null;
}

/** A button that wants a second press within 4 s, for what can't be undone. */
export function twice(button: HTMLButtonElement, question: string, run: () => void): void {
  const label = button.textContent ?? "";
  let timer: ReturnType<typeof setTimeout> | undefined;
  const relax = () => {
    clearTimeout(timer);
    button.classList.remove("sure");
    button.textContent = label;
  };
  button.onblur = relax;
  button.onclick = () => {
    if (button.classList.contains("sure")) {
      relax();
      run();
    } else {
      button.classList.add("sure");
      button.textContent = question;
      announce(`${question} Press again.`);
      timer = setTimeout(relax, 4_000);
    }
  };
}

/** Why there is no connection, in words for people. */
function explain({ code }: Status): string {
  if (code === Close.RESTARTING || code === "draining") return "The relay is restarting. Back in a moment…";
  if (code === Close.SERVER_FULL || code === "capacity") return "The relay is full. Trying again in a few seconds…";
  if (code === Close.TOO_MANY_ATTEMPTS) return "Too many wrong codes from this network. Trying again in half a minute…";
  return "The relay can't be reached. Trying again…";
}

/** Shows in banner and corner how the connection is doing. */
export function watchHealth(party: Party): void {
  const link = byId("link");
  link.hidden = false;
  const show = (status: Status) => {
    const away = status.code !== undefined && status.state !== "open" && status.state !== "closed";
    link.dataset.state = away ? "away" : status.state;
    if (status.state !== "open") setText(byId("latency"), away || status.state === "closed" ? "No connection" : "Connecting…");
    const impatient = status.code === 1006 ? { label: "Try now", run: party.wake } : undefined;
    if (away) banner(explain(status), impatient);
    else if (status.state === "open") banner("");
  };
  show(party.status());
  party.on("status", show);
  party.on("latency", ({ ms }) => setText(byId("latency"), `${Math.max(1, Math.round(ms))} ms`));
  party.on("draining", ({ seconds }) => banner(`The relay restarts within ${seconds} seconds, and this room ends with it.`));
}
