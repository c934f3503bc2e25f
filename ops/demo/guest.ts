/** A phone in somebody's hand: one big button. What happens in the game is what the host's state says. */
import { cleanName, colourOf, labelOf, newGame, parseGame, press, wins, type Game } from "./game.ts";
import { connect, type Status } from "./party.ts";
import { announce, banner, byId, Close, setQuestion, setText, watchHealth, type Place, type Screen } from "./ui.ts";

/**
 * @param name what the player called itself before; may be empty
 * @param end called with what to tell when this phone is out of the room
 */
export function guestScreen(place: Place, code: string, name: string, end: (message: string, name: string) => void): Screen {
  const party = connect({ url: place.relay, room: code });
  let game: Game = newGame();
  let slot = -1;
  let host = 0;
  let hostHere = false;
  let pressed = ""; // the round in which this phone pressed
  let entered = false;
  const myName = byId<HTMLInputElement>("myName");
  myName.value = name;

  function sayName(): void {
    name = cleanName(myName.value);
    if (name && hostHere) party.send({ name }, { to: host });
  }

  party.on("joined", (message) => {
    entered = true;
    slot = message.index;
    host = message.host ?? 0;
    if (slot === host) location.hash = "host"; // the host's tab, by the guests' link
    hostHere = message.peers.includes(host);
    sayName();
    render();
  });
  party.on("state", ({ data }) => {
    game = parseGame(data) ?? game;
    const mine = game.players[slot]?.name ?? "";
    if (mine && !myName.value) myName.value = mine; // after a reload
    render();
  });
  party.on("message", ({ from, data }) => {
    if (!wins(game, from, data)) return;
    game.winner = from; // the host will say the same: it sees the presses in this order too
    navigator.vibrate?.(from === slot ? [60, 40, 120] : 40);
    render();
  });
  party.on("host", ({ index }) => {
    host = index;
    hostHere = true;
    render();
  });
  party.on("peer_joined", ({ index }) => {
    if (index !== host) return;
    hostHere = true;
    sayName();
    render();
  });
  party.on("peer_left", ({ index }) => {
    if (index === host) hostHere = false;
    render();
  });
  party.on("status", (status) => {
    if (status.state !== "closed") return render();
    if (status.code === "closed") return;
    if (status.code === Close.REPLACED) {
      render();
      banner("You are playing in another tab.", { label: "Play here", run: () => location.reload() });
    } else end(farewell(status), name);
  });
  watchHealth(party);

  /** Why this phone is out of the room, for people. */
  function farewell({ code: why, reason }: Status): string {
    if (why === Close.ROOM_CLOSED) return "The host's room is closed.";
    if (why === Close.KICKED || why === "kicked") return "The host has removed you from that room.";
    if (why === "left") return "";
    if (why === "room_locked") return "That room is locked: its game has started.";
    if (why === "room_full") return "That room is full.";
    if (why !== "room_not_found") return `The relay didn't let you in: ${reason}.`;
    if (entered) return "The relay restarted, and the room is gone. The host's screen shows a new code.";
    return `There is no room ${code}. Capital and small letters count.`;
  }

  const canPress = () =>
    party.status().state === "open" &&
    hostHere &&
    game.phase === "open" &&
    game.winner === null &&
    pressed !== game.round &&
    !game.out.includes(slot);
  function push(): void {
    if (!canPress()) return;
    pressed = game.round;
    party.send(press(game), { echo: true });
    render();
  }
  const buzz = byId<HTMLButtonElement>("buzz");
  buzz.onpointerdown = push; // a click would wait until the finger is up again
  buzz.onclick = push; // a keyboard or a screen reader
  const onKey = (event: KeyboardEvent) => {
    const elsewhere = event.target instanceof HTMLElement && event.target.closest("input, button, a");
    if (event.repeat || elsewhere || (event.key !== " " && event.key !== "Enter")) return;
    event.preventDefault();
    push();
  };
  addEventListener("keydown", onKey);
  myName.onchange = sayName;
  byId("nameForm").onsubmit = (event) => {
    event.preventDefault();
    myName.blur();
  };
  byId("leave").onclick = () => {
    if (!party.command({ type: "leave" }) || party.status().state !== "open") end("", name);
  };

  /** What the button and the line under it say. */
  function words(): [button: string, line: string] {
    if (party.status().state !== "open") return ["…", entered ? "No connection" : `Looking for room ${code}`];
    if (game.winner === slot) return ["First!", "Your answer, please"];
    if (game.winner !== null) return ["Too late", `${labelOf(game, game.winner)} was first`];
    if (!hostHere) return ["Wait", "The host's screen is away"];
    if (game.phase === "lobby") return ["You're in", "The host starts the game"];
    if (game.phase === "ready") return ["Wait", "The next question is coming"];
    if (game.out.includes(slot)) return ["Out", "Wrong this time. Wait for the next question"];
    if (pressed === game.round) return ["Sent", "Who was first?"];
    return ["Press!", "The first to press wins"];
  }
  function render(): void {
    const { style } = document.body;
    const { label, back, text } = colourOf(slot);
    const [button, line] = words();
    const lead = game.winner === null ? undefined : colourOf(game.winner);
    for (const [property, value] of Object.entries({
      "--back": back,
      "--text": text,
      "--lead": lead?.back,
    })) {
      if (value) style.setProperty(property, value);
      else style.removeProperty(property);
    }
    const first = game.winner === slot && party.status().state === "open";
    byId("guest").dataset.view = canPress() ? "go" : first ? "first" : "wait";
    buzz.setAttribute("aria-disabled", String(!canPress()));
    setText(byId("buzzText"), button);
    setText(byId("line"), line);
    setQuestion(byId("guestQuestion"), game.phase === "open" || game.phase === "won" ? game.question : "");
    setText(byId("myColour"), slot < 0 ? "…" : label);
    const score = game.players[slot]?.score ?? 0;
    setText(byId("myScore"), String(score));
    setText(byId("points"), score === 1 ? "point" : "points");
    setText(byId("guestCode"), code);
    announce(canPress() ? `Press now. ${game.question}` : line);
  }

  byId("guest").hidden = false;
  render();
  return {
    close() {
      removeEventListener("keydown", onKey);
      party.close();
      document.body.removeAttribute("style");
      byId("guest").hidden = true;
    },
  };
}
