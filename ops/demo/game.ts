/**
 * The rules of the buzzer, without page and network. The host keeps the game as the room's state, which the relay
 * takes from nobody else; a guest only ever says its name and that it pressed. What others send is checked here.
 */

/** Guests that one room takes: a colour for each. */
export const MAX_PLAYERS = 12;
export const NAME_LENGTH = 16; // characters; fits the list on a phone
export const QUESTION_LENGTH = 140; // characters; readable from the sofa

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

export type Player = {
  /** What the player calls itself; may be empty. */
  name: string;
  score: number;
  kicked?: true;
};

export type Game = {
  phase: "lobby" | "ready" | "open" | "won";
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

export function newGame(): Game {
  return { phase: "lobby", round: "", question: "", winner: null, reactionMs: 0, out: [], players: {} };
}

export function newRound(): string {
  return Array.from(crypto.getRandomValues(new Uint32Array(3)), (part) => part.toString(36)).join("");
}

/** @returns the player in that slot, added where it is new */
export function playerOf(game: Game, slot: number): Player {
  return (game.players[slot] ??= { name: "", score: 0 });
}

/** @returns the slots that have a player, ascending */
export function slotsOf(game: Game): number[] {
  return Object.keys(game.players).map(Number);
}

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

/** @returns the name that a guest's message gives, or undefined where it gives none */
export function parseName(data: unknown): string | undefined {
  return isObject(data) && typeof data.name === "string" ? cleanName(data.name) : undefined;
}

/** One line, no control or direction characters, no towers of accents, at most NAME_LENGTH characters. */
export function cleanName(text: string): string {
  const line = text
    .slice(0, 200)
    .replace(/\s+/g, " ")
    .replace(/\p{C}|\p{Zl}|\p{Zp}/gu, "");
  const plain = line.replace(/(\p{M}{2})\p{M}+/gu, "$1").trim();
  return [...plain].slice(0, NAME_LENGTH).join("").trim();
}

/** @returns the game in a state, or undefined where it is none */
export function parseGame(data: unknown): Game | undefined {
  if (!isObject(data) || !isObject(data.players) || !Array.isArray(data.out)) return undefined;
  const { phase, round, question, winner, reactionMs } = data;
  if (phase !== "lobby" && phase !== "ready" && phase !== "open" && phase !== "won") return undefined;
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

/** The relay's codes: six characters of base58, in which no two look alike. */
export function isCode(text: string): boolean {
  return /^[1-9A-HJ-NP-Za-km-z]{6}$/.test(text);
}

/** @returns the code in what a guest typed or pasted: a code, spaced or not, or a link that ends with one */
export function findCode(text: string): string | undefined {
  const [, linked] = /[#=/]([1-9A-HJ-NP-Za-km-z]{6})\s*$/.exec(text) ?? [];
  const code = linked ?? text.replace(/[\s-]/g, "");
  return isCode(code) ? code : undefined;
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
function isSlot(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0;
}
function isAmount(value: unknown): value is number {
  return Number.isFinite(value) && (value as number) >= 0;
}
