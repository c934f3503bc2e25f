/** A phone in somebody's hand: one big button. What happens in the game is what the host's state says. */
import {
  cleanName,
  colourOf,
  hashOf,
  labelOf,
  NAME_UNITS,
  newGame,
  parseGame,
  press,
  standings,
  winners,
  wins,
  type Game,
  type Invitation,
} from "./game.ts";
import { CloseCode, connect, type Status } from "./party.ts";
import {
  announce,
  banner,
  byId,
  enable,
  closeSheet,
  openSheet,
  setQuestion,
  setText,
  showStandings,
  twice,
  watchHealth,
  type Notice,
  type Place,
  type Screen,
} from "./ui.ts";

/**
 * @param name what the player called itself before; may be empty
 * @param end called with what to tell when this phone is out of the room, and with the player's name
 */
export function guestScreen(
  place: Place,
  { code, claim }: Invitation,
  name: string,
  end: (notice: Notice, name: string) => void,
): Screen {
  const party = connect({ url: place.relay, room: code, claim });
  let game: Game = newGame();
  let pressed = ""; // the round in which this phone pressed
  let offered = false; // to another phone
  let over = false; // the room is gone, after an ending that is still shown
  const myName = byId<HTMLInputElement>("myName");
  myName.maxLength = NAME_UNITS;
  myName.value = name;

  const slot = () => party.me() ?? -1;
  const hostHere = () => party.members().some(({ host, away }) => host && !away);
  const isOpen = () => party.status().state === "open";

  function sayName(): void {
    name = cleanName(myName.value);
    if (document.activeElement !== myName) myName.value = name;
    if (name && hostHere()) party.send({ name }, { to: party.host() });
  }

  party.on("joined", ({ index, host = 0 }) => {
    if (index === host)
      location.hash = "host"; // the host's tab, by the guests' link
    else if (claim) history.replaceState(null, "", hashOf({ code })); // the token is used up, and nobody else's business
    sayName();
    render();
  });
  party.on("state", ({ data }) => {
    game = parseGame(data) ?? game;
    const mine = game.players[slot()]?.name ?? "";
    if (mine && !myName.value) myName.value = mine; // after a reload, or on another phone
    render();
  });
  party.on("message", ({ from, data }) => {
    if (!wins(game, from, data)) return;
    game.winner = from; // the host will say the same: it sees the presses in this order too
    navigator.vibrate?.(from === slot() ? [60, 40, 120] : 40);
    render();
  });
  party.on("peer_joined", ({ index }) => index === party.host() && sayName());
  party.on("members", render);
  party.on("status", (status) => {
    const { state, code: why } = status;
    if (state !== "closed") return render();
    if (why === "closed") return;
    over = game.phase === "over" && why === CloseCode.ROOM_CLOSED;
    if (over || (why === CloseCode.REPLACED && !offered)) render();
    else end(farewell(status), name);
    if (why === CloseCode.REPLACED && !offered) {
      banner("You play in another tab, or on another phone.", { label: "Play here", run: () => location.reload() });
    }
  });
  watchHealth(party);

  /** Why this phone is out of the room, for people. */
  function farewell({ code: why, reason }: Status): Notice {
    const entered = party.me() !== undefined;
    if (why === "left") return { text: "" };
    if (why === CloseCode.REPLACED) return { text: "You go on with the other phone." };
    if (why === CloseCode.ROOM_CLOSED) return { text: "The host's room is closed." };
    if (why === CloseCode.KICKED || why === "kicked") return { text: "The host has removed you from that room.", trouble: true };
    if (why === "room_locked") return { text: "That room is locked: its game has started.", trouble: true, code };
    if (why === "room_full") return { text: "That room is full.", trouble: true, code };
    if (why === "claim_not_found") {
      return { text: "That QR code was used already, or is too old. Ask for a new one.", trouble: true, code };
    }
    if (why !== "room_not_found") return { text: `The relay didn't let you in: ${reason}.`, trouble: true };
    if (entered) return { text: "The relay restarted, and the room is gone. The host's screen shows a new code.", trouble: true };
    return { text: `There is no room ${code}. Filled tiles are capital letters, the others small ones.`, trouble: true, code };
  }

  const canPress = () =>
    isOpen() &&
    hostHere() &&
    game.phase === "open" &&
    game.winner === null &&
    pressed !== game.round &&
    !game.out.includes(slot());
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
    const elsewhere = event.target instanceof HTMLElement && event.target.closest("input, button, a, dialog");
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
  twice(byId("leave"), "Really leave?", () => {
    if (!isOpen() || !party.command({ type: "leave" })) end({ text: "" }, name);
  });
  byId("move").onclick = async () => {
    try {
      const { token } = await party.offer();
      offered = true;
      const link = place.page + "/" + hashOf({ code, claim: token });
      openSheet("Go on with another phone", "Scan this with the other phone, once and within five minutes.", link);
    } catch {
      openSheet("Go on with another phone", "That doesn't work at the moment.");
    }
  };

  /** What the button and the line under it say. */
  function words(): [button: string, line: string] {
    if (over) return ["", "The host has closed the room. Thanks for playing!"];
    if (!isOpen()) return ["…", party.me() === undefined ? `Looking for room ${code}` : "No connection"];
    if (!hostHere()) return ["Wait", "The host's screen is away"];
    if (game.phase === "over") return ["", "The host may start another game"];
    if (game.winner === slot()) return ["First!", "Your answer, please"];
    if (game.winner !== null) return ["Too late", `${labelOf(game, game.winner)} was first`];
    if (game.phase === "lobby") return ["You're in", "The host starts the game"];
    if (game.phase === "ready") return ["Wait", "The next question is coming"];
    if (game.out.includes(slot())) return ["Out", "Wrong this time. Wait for the next question"];
    if (pressed === game.round) return ["Sent", "Who was first?"];
    return ["Press!", "The first to press wins"];
  }
  /** How this player did. */
  function result(): string {
    const first = winners(game);
    if (first.includes(slot())) return first.length === 1 ? "You win!" : "You share the first place";
    const all = standings(game);
    const mine = all.find((row) => row.slot === slot());
    return mine && first.length > 0 ? `Place ${mine.place} of ${all.length}` : "Nobody scored";
  }
  function render(): void {
    const { style } = document.body;
    const { label, back, text } = colourOf(slot());
    const [button, line] = words();
    const lead = game.winner === null ? undefined : colourOf(game.winner).back;
    for (const [property, value] of Object.entries({ "--back": back, "--text": text, "--lead": lead })) {
      if (value) style.setProperty(property, value);
      else style.removeProperty(property);
    }
    const first = game.winner === slot() && isOpen();
    const ended = game.phase === "over";
    byId("guesting").dataset.view = canPress() ? "go" : first ? "first" : "wait";
    enable("buzz", canPress());
    enable("move", isOpen());
    buzz.hidden = ended;
    byId("final").hidden = !ended;
    if (ended) {
      setText(byId("myPlace"), result());
      showStandings(byId("guestStandings"), game, slot());
    }
    byId("leave").hidden = byId("move").hidden = over;
    byId("out").hidden = !over;
    setText(byId("buzzText"), button);
    setText(byId("line"), line);
    setQuestion(byId("guestQuestion"), game.phase === "open" || game.phase === "won" ? game.question : "");
    setText(byId("myColour"), slot() < 0 ? "…" : label);
    const score = game.players[slot()]?.score ?? 0;
    setText(byId("myScore"), String(score));
    setText(byId("points"), score === 1 ? "point" : "points");
    setText(byId("guestCode"), code);
    announce(canPress() ? `Press now. ${game.question}` : ended ? `${result()}. ${line}` : line);
  }

  byId("guesting").hidden = false;
  render();
  return {
    close() {
      removeEventListener("keydown", onKey);
      closeSheet();
      party.close();
      document.body.removeAttribute("style");
      byId("guesting").hidden = true;
    },
  };
}
