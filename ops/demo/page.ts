/** Chooses the screen by the address: `#host`, `#CODE` (`#CODE.TOKEN` from another phone) or `?room=CODE`, or the start page. */
import { cleanName, faultOf, findInvitation, hashOf, NAME_UNITS } from "./game.ts";
import { guestScreen } from "./guest.ts";
import { hostScreen } from "./host.ts";
import { banner, byId, setText, type Notice, type Place, type Screen } from "./ui.ts";

const codeInput = byId<HTMLInputElement>("codeInput");
const nameInput = byId<HTMLInputElement>("nameInput");
nameInput.maxLength = NAME_UNITS;
let place: Place;
let screen: Screen | undefined;
let shown = "";

function show(notice?: Notice): void {
  shown = location.href;
  screen?.close();
  screen = undefined;
  banner("");
  byId("link").hidden = true;
  byId("home").hidden = true;
  const asked = location.hash.slice(1) || new URLSearchParams(location.search).get("room") || "";
  const invitation = findInvitation(asked);
  /** Leaves a screen whose room is no more: its address isn't one to come back to. */
  const end = (why: Notice, name = nameInput.value) => {
    nameInput.value = name;
    history.replaceState(null, "", location.pathname);
    show(why);
  };
  if (asked === "host") screen = hostScreen(place, end);
  else if (invitation) screen = guestScreen(place, invitation, cleanName(nameInput.value), end);
  else home(notice ?? (asked ? { text: faultOf(asked), trouble: true, code: asked } : { text: "" }));
}

function home({ text, trouble = false, code = "" }: Notice): void {
  byId("home").hidden = false;
  codeInput.value = code;
  note(text, trouble);
}

/** Says something on the start page, and points at what is wrong with the code there. */
function note(text: string, trouble: boolean): void {
  const notice = byId("notice");
  notice.hidden = text === "";
  notice.classList.toggle("trouble", trouble);
  setText(notice, text);
  codeInput.setAttribute("aria-invalid", String(trouble && codeInput.value !== ""));
  codeInput.focus();
  const misread = codeInput.value.search(/[0OIl]/);
  if (misread !== -1) codeInput.setSelectionRange(misread, misread + 1);
}

byId("joinForm").onsubmit = (event) => {
  event.preventDefault();
  const invitation = findInvitation(codeInput.value);
  if (!invitation) return note(faultOf(codeInput.value), true);
  history.pushState(null, "", location.pathname + hashOf(invitation));
  show();
};
// A link within the page fires both, and so does the browser's way back.
for (const event of ["hashchange", "popstate"]) {
  addEventListener(event, () => location.href !== shown && show());
}
try {
  place = await (await fetch("/place.json")).json();
  show();
} catch {
  banner("The server of this page can't be reached.", { label: "Try again", run: () => location.reload() });
}
