/** What the screens of the demo share: elements, banner, sheet, standings, the news for screen readers, the relay's health. */
import { colourOf, labelOf, standings, type Game } from "./game.ts";
import { CloseCode, type Party, type Status } from "./party.ts";
import { qrCode, qrSvg } from "./qr.ts";

const LONG = 60; // characters of a question that fills more than two lines of a television
const SURE_MS = 4_000; // for the second press of a button that asks

/** A screen of the page; `close` stops all that it does. */
export type Screen = { close(): void };

/** What the demo's server says: where the relay is, and the address under which phones reach this page. */
export type Place = { relay: string; page: string };

/** What the start page says to who comes there from another screen. */
export type Notice = {
  text: string;
  /** Something went wrong, rather than ended. */
  trouble?: boolean;
  /** A code to correct. */
  code?: string;
};

/** An element that index.html has. */
export function byId<T extends HTMLElement = HTMLElement>(id: string): T {
  return document.getElementById(id) as T;
}

/** Sets text if it changes: screen readers repeat what is set again. */
export function setText(element: Element, text: string): void {
  if (element.textContent !== text) element.textContent = text;
}

/** Shows the question, smaller if it is long. */
export function setQuestion(element: Element, question: string): void {
  setText(element, question);
  element.classList.toggle("long", question.length > LONG);
}

/** Gives an element the colour of a slot. */
export function paint({ style }: HTMLElement, slot: number): void {
  const { back, text } = colourOf(slot);
  style.setProperty("--back", back);
  style.setProperty("--text", text);
}

/** Shows a link as a QR code. */
export function setQr(element: Element, link: string): void {
  const image = element as HTMLImageElement;
  if (image.dataset.link === link) return;
  image.dataset.link = link;
  image.src = `data:image/svg+xml,${encodeURIComponent(qrSvg(qrCode(link)))}`;
  image.alt = `QR code of ${link}`;
}

/** Lets a button work or not. One that doesn't keeps the focus and can be read. */
export function enable(id: string, works: boolean): void {
  byId(id).setAttribute("aria-disabled", String(!works));
}
addEventListener(
  "click",
  (event) => {
    if (!(event.target as Element).closest("[aria-disabled=true]")) return;
    event.preventDefault(); // of a form that would be sent
    event.stopImmediatePropagation();
  },
  { capture: true },
);

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

/** Shows a sheet over the screen, with a link as a QR code and a button for something other than closing it, or without them. */
export function openSheet(title: string, text: string, link?: string, action?: { label: string; run: () => void }): void {
  const sheet = byId<HTMLDialogElement>("sheet");
  setText(byId("sheetTitle"), title);
  setText(byId("sheetText"), text);
  byId("sheetQr").hidden = link === undefined;
  if (link !== undefined) setQr(byId("sheetQr"), link);
  const button = byId<HTMLButtonElement>("sheetAction");
  button.hidden = action === undefined;
  setText(button, action?.label ?? "");
  button.onclick = () => {
    sheet.close();
    action?.run();
  };
  byId("sheetClose").onclick = closeSheet;
  if (!sheet.open) sheet.showModal();
  byId("sheetClose").focus();
}

/** Closes the sheet if it is open. */
export function closeSheet(): void {
  byId<HTMLDialogElement>("sheet").close();
}

/** A button that wants a second press within 4 s, for what can't be undone. */
export function twice(button: HTMLElement, question: string, run: () => void): void {
  const label = (button.dataset.label ??= button.textContent);
  let timer: ReturnType<typeof setTimeout> | undefined;
  const relax = () => {
    clearTimeout(timer);
    button.classList.remove("sure");
    setText(button, label);
  };
  relax();
  button.onblur = relax;
  button.onclick = () => {
    if (button.classList.contains("sure")) {
      relax();
      run();
    } else {
      button.classList.add("sure");
      setText(button, question);
      announce(`${question} Press again.`);
      timer = setTimeout(relax, SURE_MS);
    }
  };
}

/** Lists the players with their places. @param mine the slot to point out */
export function showStandings(list: HTMLElement, game: Game, mine?: number): void {
  const rows = standings(game).map(({ slot, place, score }) => {
    const row = document.createElement("li");
    paint(row, slot);
    if (slot === mine) row.setAttribute("aria-current", "true");
    const parts = { place, swatch: "", name: labelOf(game, slot), score };
    for (const [name, text] of Object.entries(parts)) {
      const part = row.appendChild(document.createElement("span"));
      part.className = name;
      part.textContent = String(text);
    }
    return row;
  });
  list.replaceChildren(...rows);
}

/** Why there is no connection, in words for people. */
function explain({ code }: Status): string {
  if (code === CloseCode.RESTARTING || code === "draining") return "The relay is restarting. Back in a moment…";
  if (code === CloseCode.SERVER_FULL || code === "capacity") return "The relay is full. Trying again in a few seconds…";
  if (code === CloseCode.TOO_MANY_ATTEMPTS) return "Too many wrong codes from this network. Trying again in half a minute…";
  return "The relay can't be reached. Trying again…";
}

/** Shows in banner and corner how the connection is doing. */
export function watchHealth(party: Party): void {
  const link = byId("link");
  const show = (status: Status) => {
    const away = status.code !== undefined && status.state !== "open" && status.state !== "closed";
    link.hidden = status.state === "closed";
    link.dataset.state = away ? "away" : status.state;
    if (status.state !== "open") {
      setText(byId("latency"), away ? "No connection" : "Connecting…");
      closeSheet(); // what it offers needs the relay
    }
    const impatient = status.code === 1006 ? { label: "Try now", run: party.wake } : undefined;
    if (away) banner(explain(status), impatient);
    else if (status.state === "open") banner("");
  };
  show(party.status());
  party.on("status", show);
  party.on("latency", ({ ms }) => setText(byId("latency"), `${Math.max(1, Math.round(ms))} ms`));
  party.on("draining", ({ seconds }) => banner(`The relay restarts within ${seconds} seconds, and this room ends with it.`));
}
