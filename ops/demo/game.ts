/**
 * The rules of the buzzer, without page and network. The host keeps the game as the room's state, which the relay
 * takes from nobody else; a guest only ever says its name and that it pressed. What others send is checked here.
 */

/** Guests that one room takes. From the thirteenth on they share colours. */
export const MAX_PLAYERS = 24;
const NAME_LENGTH = 16; // characters as people count them; fits the list on a phone
/** The longest name in UTF-16 code units, as JavaScript and `maxlength` count: four families; those of a full room fit its state. */
export const NAME_UNITS = 48;
/** The longest question in UTF-16 code units; readable from the sofa. */
export const QUESTION_LENGTH = 140;

/** Label, background and text colour of a slot; the two contrast by 4.5 or more. */
export const COLOURS = [
  { label: "Coral", back: "#ff6b5e", text: "#1c0a08" },
  { label: "Sky", back: "#4cb8ff", text: "#04131f" },
  { label: "Sun", back: "#ffc62e", text: "#1f1600" },
  { label: "Mint", back: "#2fd6a3", text: "#02180f" },
  { label: "Grape", back: "#7a45f0", text: "#ffffff" },
  { label: "Rose", back: "#ff86c1", text: "#22060f" },
  { label: "Lime", back: "#a5d62f", text: "#121900" },
  { label: "Ocean", back: "#1f62d8", text: "#ffffff" },
  { label: "Rust", back: "#b14d15", text: "#ffffff" },
  { label: "Forest", back: "#1b7a44", text: "#ffffff" },
  { label: "Plum", back: "#a12c8f", text: "#ffffff" },
  { label: "Sand", back: "#d9b98a", text: "#1d1304" },
] as const;

const PHASES = ["lobby", "ready", "open", "won", "over"] as const;

type Player = {
  /** What the player calls itself; may be empty. */
  name: string;
  score: number;
  kicked?: true;
};

/** What the host keeps as the room's state, and everybody shows. */
export type Game = {
  phase: (typeof PHASES)[number];
  /** Names one opening of the buzzer. It can't be guessed, so nobody presses before it is open. */
  round: string;
  question: string;
  /** The slot that was first. */
  winner: number | null;
  /** Milliseconds from the opening to the first press, as the host saw them. */
  reactionMs: number;
  /** Slots that answered this question wrongly. */
  out: number[];
  /** By slot; the host's isn't among them. */
  players: Record<number, Player>;
};

/** A game that nobody has joined, in its lobby. */
export function newGame(): Game {
  return { phase: "lobby", round: "", question: "", winner: null, reactionMs: 0, out: [], players: {} };
}

/** A name for an opening of the buzzer: 96 random bits, at most 21 letters and digits. */
export function newRound(): string {
  return Array.from(crypto.getRandomValues(new Uint32Array(3)), (part) => part.toString(36)).join("");
}

/** @returns the player in that slot, added if it is new */
export function playerOf(game: Game, slot: number): Player {
  return (game.players[slot] ??= { name: "", score: 0 });
}

/** @returns the slots that have a player: by score, the best first, those who joined first before others; who was kicked, last */
export function slotsOf(game: Game): number[] {
  const order = (slot: number) => (game.players[slot]!.kicked ? -1 : game.players[slot]!.score);
  const slots = Object.keys(game.players).map(Number);
  return slots.sort((a, b) => order(b) - order(a) || a - b);
}

/** @returns who plays, by score, with their places; equal scores share one */
export function standings(game: Game): { slot: number; place: number; score: number }[] {
  const playing = slotsOf(game).filter((slot) => !game.players[slot]!.kicked);
  const scores = playing.map((slot) => game.players[slot]!.score);
  return playing.map((slot, i) => ({ slot, place: 1 + scores.indexOf(scores[i]!), score: scores[i]! }));
}

/** @returns the slots that won; none if nobody has a point */
export function winners(game: Game): number[] {
  return standings(game).flatMap(({ slot, place, score }) => (place === 1 && score > 0 ? [slot] : []));
}

/** The same players start anew. */
export function rematch({ players }: Game): Game {
  const anew = Object.entries(players).map(([slot, player]) => [slot, { ...player, score: 0 }]);
  return { ...newGame(), phase: "ready", players: Object.fromEntries(anew) };
}

/** The colour of the player in a slot; slots 12 apart share one. */
export function colourOf(slot: number): (typeof COLOURS)[number] {
  return COLOURS[Math.max(0, slot - 1) % COLOURS.length]!;
}

/** What to call the player in a slot: its name, or its colour. */
export function labelOf(game: Game, slot: number): string {
  const lap = Math.ceil(slot / COLOURS.length);
  return game.players[slot]?.name || colourOf(slot).label + (lap > 1 ? ` ${lap}` : "");
}

/** A press, as guests broadcast it with `echo`: all see all presses in the relay's one order. */
export function press(game: Game): { press: string } {
  return { press: game.round };
}

/** Whether a message is the first valid press of the open round. */
export function wins(game: Game, from: number, data: unknown): boolean {
  if (game.phase !== "open" || game.winner !== null || game.out.includes(from)) return false;
  return game.round !== "" && isObject(data) && data.press === game.round;
}

/** @returns the name that a guest's message gives, or undefined if it gives none */
export function parseName(data: unknown): string | undefined {
  return isObject(data) && typeof data.name === "string" ? cleanName(data.name) : undefined;
}

const characters = new Intl.Segmenter(); // a family, a flag or a letter with its accents is one
const EMOJI = /^\p{RGI_Emoji}$/v;

/** One line, no control or direction characters, no towers of accents; emoji stay whole. At most NAME_LENGTH characters. */
export function cleanName(text: string): string {
  const line = text.slice(0, 500).replace(/\s+/g, " ").trimStart();
  let name = "";
  let count = 0;
  for (const { segment } of characters.segment(line)) {
    const plain = segment.replace(/\p{C}|\p{Zl}|\p{Zp}/gu, "").replace(/(\p{M}{2})\p{M}+/gu, "$1");
    const character = EMOJI.test(segment) ? segment : plain;
    if (character === "") continue;
    if (++count > NAME_LENGTH || name.length + character.length > NAME_UNITS) break;
    name += character;
  }
  return name.trim();
}

/** @returns the game in a state, or undefined if it is none */
export function parseGame(data: unknown): Game | undefined {
  if (!isObject(data) || !isObject(data.players) || !Array.isArray(data.out)) return undefined;
  const { phase, round, question, winner, reactionMs } = data;
  if (!isPhase(phase)) return undefined;
  if (typeof round !== "string" || typeof question !== "string" || !isAmount(reactionMs)) return undefined;
  if (winner !== null && !isSlot(winner)) return undefined;
  const players: Game["players"] = {};
  for (const [slot, player] of Object.entries(data.players)) {
    if (!isSlot(Number(slot)) || !isObject(player)) return undefined;
    if (typeof player.name !== "string" || !isAmount(player.score)) return undefined;
    players[Number(slot)] = {
      name: cleanName(player.name),
      score: player.score,
      ...(player.kicked === true && { kicked: true }),
    };
  }
  const out = data.out.filter(isSlot);
  return { phase, round, question: question.slice(0, QUESTION_LENGTH), winner, reactionMs, out, players };
}

/** Where to go: the code of a room and, for a player who goes on with another phone, the token of an offer. */
export type Invitation = { code: string; claim?: string };

/** @returns the room in what a guest typed, pasted or scanned: a code, spaced or not, or a link that ends with one */
export function findInvitation(text: string): Invitation | undefined {
  const [, code, claim] = /(?:^|[#=/])([1-9A-HJ-NP-Za-km-z]{6})(?:\.([\w-]{22}))?$/.exec(text.trim()) ?? [];
  if (code) return { code, ...(claim && { claim }) };
  const compact = text.replace(/[\s-]/g, "");
  return compact === text ? undefined : findInvitation(compact);
}

/** @returns the end of a link to this page that `findInvitation` understands */
export function hashOf({ code, claim }: Invitation): string {
  return `#${code}${claim ? `.${claim}` : ""}`;
}

/** The characters that people take others for, which is why no code has them. */
const MISREAD: Record<string, string> = {
  0: "0 (zero): try a small o.",
  O: "capital O: try a small o.",
  I: "capital I: try 1, or a small i.",
  l: "small L: try 1, a capital L, or a small i.",
};

/** @returns what keeps a text from being a code, for people */
export function faultOf(text: string): string {
  const typed = [...text.replace(/[\s-]/g, "")];
  const misread = [...new Set(typed)].flatMap((character) => MISREAD[character] ?? []);
  if (misread.length > 0) return misread.map((what) => `No code has a ${what}`).join("\n");
  if (typed.length !== 6) return `A code has six characters, this has ${typed.length}.`;
  return "A code has only letters and digits.";
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
function isPhase(value: unknown): value is Game["phase"] {
  return (PHASES as readonly unknown[]).includes(value);
}
function isSlot(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0;
}
function isAmount(value: unknown): value is number {
  return Number.isFinite(value) && (value as number) >= 0;
}
