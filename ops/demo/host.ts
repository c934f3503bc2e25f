/** The screen that everybody looks at: it creates the room, asks, and keeps the game as the room's state. */
import {
  colourOf,
  labelOf,
  MAX_PLAYERS,
  newGame,
  newRound,
  parseGame,
  parseName,
  playerOf,
  QUESTION_LENGTH,
  slotsOf,
  wins,
  type Game,
} from "./game.ts";
import { connect } from "./party.ts";
import { announce, banner, byId, Close, setQuestion, setText, twice, watchHealth, type Place, type Screen } from "./ui.ts";

const LINGER_SECONDS = 120; // alone in the room, and away to send the code to somebody
const GRACE_SECONDS = 300; // before guests are told that the host doesn't come back
const BACK_MS = 4_000; // how long a player is shown as back rather than here
const PLAYERS_KEPT = 60; // those who are gone included; the state stays well below what the relay takes
const NAMES_MS = 200; // names that come within this go out together

type Presence = "here" | "away" | "back" | "left";

/** @param end called with what to tell when the game is over */
export function hostScreen(place: Place, end: (message: string) => void): Screen {
  const create = { maxClients: MAX_PLAYERS + 1, linger: LINGER_SECONDS, hostGrace: GRACE_SECONDS };
  const party = connect({ url: place.relay, create });
  let game = newGame();
  let known = false; // whether `game` is the room's: not so after a reload, until the relay has given it back
  let room = "";
  let locked = false;
  let openedAt = 0;
  let namesTimer: ReturnType<typeof setTimeout> | undefined;
  const presence = new Map<number, Presence>();
  const rows = new Map<number, HTMLLIElement>();

  function publish(): void {
    clearTimeout(namesTimer);
    namesTimer = undefined;
    if (party.status().state === "open") party.command({ type: "set_state", data: game });
    render();
  }
  function change(next: Partial<Game>): void {
    Object.assign(game, next);
    publish();
  }
  function openRound(question: string, out: number[]): void {
    openedAt = performance.now();
    change({ phase: "open", round: newRound(), question, out, winner: null });
  }
  /** Presses may have been missed while this screen was away: the round starts again, for all alike. */
  function resume(): void {
    if (game.phase === "open") openRound(game.question, game.out);
    else publish();
  }
  function arrive(slot: number, how: Presence): void {
    presence.set(slot, how);
    playerOf(game, slot);
    const gone = slotsOf(game).filter((known) => !here().includes(known));
    if (slotsOf(game).length > PLAYERS_KEPT) delete game.players[gone[0]!];
  }

  party.on("created", (message) => {
    game = newGame();
    presence.clear();
    locked = false;
    known = true;
    if (room) banner("The relay restarted: this is a new room, and everybody needs the new code.", dismiss);
    room = message.room;
    publish();
  });
  party.on("joined", (message) => {
    room = message.room;
    locked = message.locked === true;
    for (const slot of presence.keys()) if (!message.peers.includes(slot)) presence.set(slot, "away");
    for (const slot of message.peers) arrive(slot, "here");
    if (known) resume();
    else render();
  });
  party.on("state", ({ data }) => {
    if (known) return; // what this page has is newer
    known = true;
    const arrived = slotsOf(game);
    game = parseGame(data) ?? game;
    for (const slot of arrived) playerOf(game, slot);
    resume();
  });
  party.on("peer_joined", ({ index, resumed }) => {
    arrive(index, resumed ? "back" : "here");
    announce(`${labelOf(game, index)} ${resumed ? "is back" : "joined"}`);
    if (resumed) {
      setTimeout(() => {
        if (presence.get(index) !== "back" || party.status().state === "closed") return;
        presence.set(index, "here");
        render();
      }, BACK_MS);
    }
    publish();
  });
  party.on("peer_left", ({ index, reason }) => {
    presence.set(index, reason === "left" ? "left" : "away");
    announce(`${labelOf(game, index)} ${reason === "kicked" ? "was kicked" : reason ? "left" : "is away"}`);
    render();
  });
  party.on("room", (message) => {
    locked = message.locked;
    announce(locked ? "The room is locked" : "The room is open");
    render();
  });
  party.on("message", ({ from, data }) => {
    const name = parseName(data);
    if (name !== undefined && name !== playerOf(game, from).name) {
      playerOf(game, from).name = name;
      namesTimer ??= setTimeout(publish, NAMES_MS);
      render();
    } else if (wins(game, from, data)) {
      change({ phase: "won", winner: from, reactionMs: performance.now() - openedAt });
      announce(`${labelOf(game, from)} was first`);
    }
  });
  party.on("error", ({ message }) => banner(`The relay refused that: ${message}.`, dismiss));
  party.on("status", (status) => {
    if (status.state === "closed" && status.code === Close.REPLACED) {
      banner("This game went on in another tab.", { label: "Host here", run: () => location.reload() });
    } else if (status.state === "closed" && status.code !== "closed") {
      end(status.code === Close.ROOM_CLOSED ? "The game is over." : `The relay didn't let this screen in: ${status.reason}.`);
    }
  });
  watchHealth(party);

  const dismiss = { label: "OK", run: () => banner("") };
  const question = byId<HTMLInputElement>("question");
  question.maxLength = QUESTION_LENGTH;
  byId("start").onclick = () => {
    if (here().length === 0) return;
    party.command({ type: "set_room", locked: true });
    change({ phase: "ready" });
  };
  byId("askForm").onsubmit = (event) => {
    event.preventDefault();
    openRound(question.value.trim(), []);
    question.value = "";
  };
  byId("shut").onclick = () => change({ phase: "ready" });
  byId("right").onclick = () => {
    if (game.winner !== null) playerOf(game, game.winner).score++;
    change({ phase: "ready", winner: null });
  };
  byId("wrong").onclick = () => {
    const out = game.winner === null ? game.out : [...game.out, game.winner];
    if (here().some((slot) => !out.includes(slot))) openRound(game.question, out);
    else change({ phase: "ready", winner: null });
  };
  byId("lock").onclick = () => party.command({ type: "set_room", locked: !locked });
  twice(byId<HTMLButtonElement>("finish"), "Really end it?", () => party.command({ type: "close_room" }));
  byId("copy").onclick = async () => {
    const copied = await navigator.clipboard?.writeText(joinUrl()).then(
      () => true,
      () => false,
    );
    setText(byId("copy"), copied ? "Copied" : "Copying isn't allowed here");
    setTimeout(() => setText(byId("copy"), "Copy the link"), 2_000);
  };

  const joinUrl = () => `${place.page}/#${room}`;
  /** Slots that play at the moment. */
  function here(): number[] {
    return [...presence.keys()].filter((slot) => ["here", "back"].includes(presence.get(slot)!));
  }

  function render(): void {
    const screen = byId("host");
    const moved = screen.dataset.phase !== undefined && screen.dataset.phase !== game.phase;
    screen.dataset.phase = game.phase;
    renderInvite();
    const count = here().length;
    const waiting = room ? "Waiting for the first player" : "Waiting for the relay";
    setText(byId("headcount"), count === 0 ? waiting : `${count} in. Everybody there?`);
    byId("start").setAttribute("aria-disabled", String(count === 0));
    for (const asked of screen.querySelectorAll(".asked")) setQuestion(asked, game.question);
    if (game.winner !== null) {
      const { back, text } = colourOf(game.winner);
      const winner = byId("winner");
      winner.style.setProperty("--back", back);
      winner.style.setProperty("--text", text);
      setText(winner.querySelector("b")!, labelOf(game, game.winner));
      setText(winner.querySelector("span")!, `was first, after ${(game.reactionMs / 1000).toFixed(2)} s`);
    }
    renderPlayers();
    setText(byId("lock"), locked ? "Unlock the room" : "Lock the room");
    byId("locked").hidden = !locked;
    byId("openToAll").hidden = locked;
    // The control that had the focus is gone with its phase: the next one takes it.
    const first = { lobby: "start", ready: "question", open: "shut", won: "right" }[game.phase];
    if (moved) byId(first).focus({ preventScroll: true });
  }
  function renderInvite(): void {
    const link = byId<HTMLAnchorElement>("joinLink");
    link.href = joinUrl();
    setText(link, place.page.replace(/^https?:\/\//, ""));
    const code = byId("code");
    if (code.dataset.code === room) return;
    code.dataset.code = room;
    code.setAttribute("aria-label", room ? `Room code: ${[...room].map(spoken).join(", ")}` : "No room yet");
    code.replaceChildren(
      ...[...room.padEnd(6)].map((character) => {
        const tile = document.createElement("span");
        tile.textContent = character;
        tile.className = /[A-Z]/.test(character) ? "capital" : "";
        return tile;
      }),
    );
  }
  function renderPlayers(): void {
    const list = byId("players");
    const slots = slotsOf(game);
    for (const [slot, row] of rows) {
      if (slots.includes(slot)) continue;
      row.remove();
      rows.delete(slot);
    }
    for (const slot of slots) {
      const next = slots.find((other) => other > slot && rows.has(other));
      const row = rows.get(slot) ?? list.insertBefore(newRow(slot), next === undefined ? null : rows.get(next)!);
      rows.set(slot, row);
      const player = playerOf(game, slot);
      const status = player.kicked ? "kicked" : (presence.get(slot) ?? "away");
      row.dataset.status = status;
      row.classList.toggle("first", game.winner === slot);
      setText(row.querySelector(".name")!, labelOf(game, slot));
      setText(row.querySelector(".status")!, game.out.includes(slot) && status === "here" ? "out" : status);
      setText(row.querySelector(".score")!, String(player.score));
      row.querySelector("button")!.setAttribute("aria-label", `Kick ${labelOf(game, slot)}`);
      row.querySelector("button")!.hidden = player.kicked === true;
    }
    setText(byId("count"), String(here().length));
    byId("nobody").hidden = slots.length > 0;
  }
  function newRow(slot: number): HTMLLIElement {
    const row = document.createElement("li");
    const { back } = colourOf(slot);
    row.style.setProperty("--back", back);
    for (const name of ["swatch", "name", "status", "score"]) {
      row.appendChild(document.createElement("span")).className = name;
    }
    const kick = row.appendChild(document.createElement("button"));
    kick.type = "button";
    kick.className = "small";
    kick.textContent = "Kick";
    twice(kick, "Sure?", () => {
      playerOf(game, slot).kicked = true;
      party.command({ type: "kick", index: slot });
      publish();
    });
    return row;
  }

  byId("host").hidden = false;
  delete byId("host").dataset.phase;
  byId("players").replaceChildren();
  render();
  return {
    close() {
      clearTimeout(namesTimer);
      party.close();
      byId("host").hidden = true;
    },
  };
}

function spoken(character: string): string {
  if (/\d/.test(character)) return character;
  return `${/[A-Z]/.test(character) ? "capital" : "small"} ${character.toUpperCase()}`;
}
