/** The screen that everybody looks at: it creates the room, asks, and keeps the game as the room's state. */
import {
  hashOf,
  labelOf,
  MAX_PLAYERS,
  newGame,
  newRound,
  parseGame,
  parseName,
  playerOf,
  QUESTION_LENGTH,
  rematch,
  slotsOf,
  winners,
  wins,
  type Game,
} from "./game.ts";
import { CloseCode, connect } from "./party.ts";
import { playerList } from "./players.ts";
import {
  announce,
  banner,
  byId,
  closeSheet,
  enable,
  openSheet,
  paint,
  setQr,
  setQuestion,
  setText,
  showStandings,
  twice,
  watchHealth,
  type Notice,
  type Place,
  type Screen,
} from "./ui.ts";

const LINGER_SECONDS = 120; // alone in the room, and away to send the code to somebody
const GRACE_SECONDS = 300; // before guests are told that the host doesn't come back
const BACK_MS = 4_000; // how long a player is shown as back rather than here
const PLAYERS_KEPT = 60; // those who are gone included; the state stays below what the relay takes
const NAMES_MS = 200; // names that come within this go out together

/** @param end called with what to tell when the room is gone */
export function hostScreen(place: Place, end: (notice: Notice) => void): Screen {
  const create = { maxClients: MAX_PLAYERS + 1, linger: LINGER_SECONDS, hostGrace: GRACE_SECONDS };
  const party = connect({ url: place.relay, create });
  let game = newGame();
  let known = false; // whether `game` is the room's: not so after a reload, until the relay has given it back
  let room = "";
  let locked = false;
  let openedAt = 0;
  let namesTimer: ReturnType<typeof setTimeout> | undefined;
  const back = new Set<number>(); // who came back a moment ago
  const renderList = playerList(about);

  const isOpen = () => party.status().state === "open";
  /** Slots that play at the moment. */
  const here = () => party.members().flatMap(({ index, away, me }) => (away || me ? [] : [index]));
  const joinUrl = () => place.page + "/" + hashOf({ code: room });

  function publish(): void {
    clearTimeout(namesTimer);
    namesTimer = undefined;
    if (isOpen()) party.command({ type: "set_state", data: game });
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
  function arrive(slot: number): void {
    playerOf(game, slot);
    const slots = slotsOf(game);
    const gone = slots.findLast((other) => !here().includes(other) && other !== slot);
    if (slots.length > PLAYERS_KEPT && gone !== undefined) delete game.players[gone];
  }

  party.on("created", (message) => {
    game = newGame();
    locked = false;
    known = true;
    if (room) banner("The relay restarted: this is a new room, and everybody needs the new code.", dismiss);
    room = message.room;
    publish();
  });
  party.on("joined", (message) => {
    room = message.room;
    locked = message.locked === true;
    message.peers.forEach(arrive);
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
    arrive(index);
    announce(`${labelOf(game, index)} ${resumed ? "is back" : "joined"}`);
    if (resumed) {
      closeSheet(); // which shows how to come back
      back.add(index);
      setTimeout(() => {
        back.delete(index);
        if (party.status().state !== "closed") render();
      }, BACK_MS);
    }
    publish();
  });
  party.on("peer_left", ({ index, reason }) => {
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
  party.on("status", ({ state, code, reason }) => {
    if (state !== "closed") return render();
    if (code === CloseCode.REPLACED) {
      banner("This game went on in another tab.", { label: "Host here", run: () => location.reload() });
      render();
    } else if (code === CloseCode.ROOM_CLOSED) end({ text: "The game is over. Thanks for playing!" });
    else if (code !== "closed") end({ text: `The relay didn't let this screen in: ${reason}.`, trouble: true });
  });
  watchHealth(party);

  const dismiss = { label: "OK", run: () => banner("") };
  const question = byId<HTMLInputElement>("question");
  question.maxLength = QUESTION_LENGTH;
  byId("start").onclick = () => {
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
  byId("again").onclick = () => change(rematch(game));
  byId("lock").onclick = () => party.command({ type: "set_room", locked: !locked });
  twice(byId("finish"), "Really end it?", () => {
    if (game.phase === "lobby") party.command({ type: "close_room" });
    else change({ phase: "over", winner: null });
  });
  twice(byId("close"), "Really close it?", () => party.command({ type: "close_room" }));
  byId("copy").onclick = async () => {
    const copied = await navigator.clipboard?.writeText(joinUrl()).then(
      () => true,
      () => false,
    );
    setText(byId("copy"), copied ? "Copied" : "Copying isn't allowed here");
    setTimeout(() => setText(byId("copy"), "Copy the link"), 2_000);
  };
  byId("showQr").onclick = () => openSheet("Join the game", joinUrl(), joinUrl());
  // After a click beside the buttons, Enter still means what it meant: the phase's main button.
  const onKey = (event: KeyboardEvent) => {
    if (event.key !== "Enter" || event.target !== document.body) return;
    event.preventDefault(); // or the key goes on to what gets the focus next
    byId(firstOf(game)).click();
  };
  addEventListener("keydown", onKey);

  /** Shows what the host can do for, or against, a player. */
  async function about(slot: number): Promise<void> {
    const name = labelOf(game, slot);
    const kick = {
      label: `Kick ${name}`,
      run: () => {
        playerOf(game, slot).kicked = true;
        party.command({ type: "kick", index: slot });
        publish();
      },
    };
    if (here().includes(slot)) {
      return openSheet(name, "To go on with another phone, press “Another phone” on the one that plays now.", undefined, kick);
    }
    try {
      const { token } = await party.offer(slot);
      const link = place.page + "/" + hashOf({ code: room, claim: token });
      openSheet(name, `Whoever scans this goes on as ${name}, once and within five minutes.`, link, kick);
    } catch {
      openSheet(name, `${name} can't come back with another phone at the moment.`, undefined, kick);
    }
  }

  function render(): void {
    const screen = byId("hosting");
    const before = screen.dataset.phase;
    screen.dataset.phase = game.phase;
    const count = here().length;
    const waiting = room ? "Waiting for the first player" : "Waiting for the relay";
    setText(byId("headcount"), !isOpen() ? "No connection" : count === 0 ? waiting : `${count} in. Everybody there?`);
    byId("waiting").classList.toggle("still", !isOpen());
    setText(byId("waiting"), isOpen() ? "The buzzer is open" : "No connection: the question starts again later");
    for (const id of ["open", "shut", "right", "wrong", "again", "close", "lock", "finish"]) enable(id, isOpen());
    enable("start", isOpen() && count > 0);
    for (const asked of screen.querySelectorAll(".asked")) setQuestion(asked, game.question);
    if (game.winner !== null) {
      const winner = byId("winner");
      paint(winner, game.winner);
      setText(winner.querySelector("b")!, labelOf(game, game.winner));
      setText(winner.querySelector("span")!, `was first, after ${(game.reactionMs / 1000).toFixed(2)} s`);
    }
    renderInvite();
    renderList(game, (slot) => (here().includes(slot) ? (back.has(slot) ? "back" : "here") : "away"), isOpen());
    setText(byId("count"), String(count));
    setText(byId("lock"), locked ? "Unlock room" : "Lock room");
    if (game.phase === "over") {
      setText(byId("verdict"), verdict(game));
      const [first, ...others] = winners(game);
      if (first !== undefined && others.length === 0) paint(byId("verdict"), first);
      else byId("verdict").removeAttribute("style");
      showStandings(byId("standings"), game);
    }
    // The control that had the focus is gone with its phase: the next one takes it.
    if (before !== game.phase) {
      byId(firstOf(game)).focus({ preventScroll: true });
      if (game.phase === "over") announce(verdict(game));
    }
  }
  function renderInvite(): void {
    const address = place.page.replace(/^https?:\/\//, "");
    const shut = "Locked: only who was in comes back.";
    const link = byId<HTMLAnchorElement>("joinLink");
    setText(link, address);
    setText(byId("scan"), locked ? shut : "Scan it with a phone, or open");
    setText(byId("where"), locked ? shut : `Join at ${address}`);
    setText(byId("stripCode"), room);
    byId("showQr").hidden = locked;
    byId("invite").dataset.ready = String(room !== "");
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
    if (!room) return;
    link.href = joinUrl();
    setQr(byId("qr"), joinUrl());
  }

  byId("hosting").hidden = false;
  delete byId("hosting").dataset.phase;
  render();
  return {
    close() {
      clearTimeout(namesTimer);
      removeEventListener("keydown", onKey);
      closeSheet();
      party.close();
      byId("hosting").hidden = true;
    },
  };
}

/** The control that a phase is mostly about. */
function firstOf({ phase }: Game): string {
  return { lobby: "start", ready: "question", open: "shut", won: "right", over: "again" }[phase];
}

/** Who won, for all to read. */
function verdict(game: Game): string {
  const names = winners(game).map((slot) => labelOf(game, slot));
  if (names.length === 0) return "Nobody scored";
  if (names.length > 3) return `${names.length} share the first place`;
  return `${new Intl.ListFormat("en").format(names)} ${names.length === 1 ? "wins" : "win"}`;
}

function spoken(character: string): string {
  if (/\d/.test(character)) return character;
  return `${/[A-Z]/.test(character) ? "capital" : "small"} ${character.toUpperCase()}`;
}
