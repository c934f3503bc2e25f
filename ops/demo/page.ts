/** Chooses the screen by the address: `#host`, `#CODE` or `?room=CODE`, or the form for a code. */
import { findCode, isCode, NAME_LENGTH } from "./game.ts";
import { guestScreen } from "./guest.ts";
import { hostScreen } from "./host.ts";
import { banner, byId, setText, type Place, type Screen } from "./ui.ts";

const codeInput = byId<HTMLInputElement>("codeInput");
const nameInput = byId<HTMLInputElement>("nameInput");
for (const input of [nameInput, byId<HTMLInputElement>("myName")]) input.maxLength = NAME_LENGTH;
let place: Place;
let screen: Screen | undefined;
let shown = "";

/** Goes to another screen of this page; the address says which, so that a reload shows it again. */
function go(hash: string, trouble = ""): void {
  history.pushState(null, "", location.pathname + hash);
  show(trouble);
}

function show(trouble = ""): void {
  shown = location.href;
  screen?.close();
  screen = undefined;
  banner("");
  byId("link").hidden = true;
  byId("home").hidden = true;
  const asked = location.hash.slice(1) || new URLSearchParams(location.search).get("room") || "";
  const end = (message: string, name = nameInput.value) => {
    nameInput.value = name;
    go("", message);
  };
  if (asked === "host") screen = hostScreen(place, end);
  else if (isCode(asked)) screen = guestScreen(place, asked, nameInput.value, end);
  else home(trouble || (asked && `“${asked.slice(0, 20)}” is no room code.`));
}

function home(trouble: string): void {
  byId("home").hidden = false;
  setText(byId("trouble"), trouble);
  byId("trouble").hidden = trouble === "";
  codeInput.value = "";
  codeInput.focus();
}

byId("joinForm").onsubmit = (event) => {
  event.preventDefault();
  const code = findCode(codeInput.value);
  if (code) go(`#${code}`);
  else {
    const typed = codeInput.value;
    home("A code has six characters: digits and letters, but no 0, O, I or l.");
    codeInput.value = typed;
  }
};
byId("brand").onclick = (event) => {
  event.preventDefault();
  go("");
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
