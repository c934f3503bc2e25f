/** Who sends to whom, how often, when, and how much. A member's place is its number in its room, 0 for whoever created it. */
import type { Scenario } from "./options.ts";

/** Data of these sizes is what games send. */
const LEAST_BYTES = 65;
const MOST_BYTES = 90;
/** Senders next to each other differ much; this and the number of sizes have no common divisor, so all sizes occur alike. */
const SIZE_STEP = 11;

const NEAR = 0.1; // part of the interval in which a room's members send with --phase near

/** Members that send equally often, in the order in which they do. */
export type Schedule = {
  intervalMs: number;
  /** Ms after the interval's beginning. */
  moments: { room: number; place: number; atMs: number }[];
};

export class Traffic {
  /** The members at the first so many places of each room send. */
  readonly senders: number;
  readonly #scenario: Scenario;
  /** By place: looked up once for each delivery. */
  readonly #targets: (number | undefined)[];

  constructor(scenario: Scenario) {
    const { senders, clients, game, targeted } = scenario;
    this.#scenario = scenario;
    this.senders = game !== undefined || senders === "all" ? clients : senders;
    this.#targets = Array.from({ length: clients }, (_, place) => {
      if (game !== undefined) return place === 0 ? undefined : 0;
      return targeted ? (place + 1) % clients : undefined;
    });
  }

  /** The place to which the member at `place` sends; undefined if it sends to all others. */
  targetOf(place: number): number | undefined {
    return this.#targets[place];
  }

  /** Whether messages from one place are for another. */
  reaches(from: number, to: number): boolean {
    if (from >= this.senders) return false;
    const target = this.#targets[from];
    return target === undefined ? from !== to : target === to;
  }

  /** How many get a message from `place`. */
  fan(place: number): number {
    return this.targetOf(place) === undefined ? this.#scenario.clients - 1 : 1;
  }

  /** Bytes of data that a member sends each time. */
  sizeOf(id: number): number {
    return this.#scenario.bytes ?? LEAST_BYTES + ((id * SIZE_STEP) % (MOST_BYTES - LEAST_BYTES + 1));
  }

  /** The largest of those. */
  get largest(): number {
    return this.#scenario.bytes ?? MOST_BYTES;
  }

  /** When who sends; a schedule for each rate. */
  schedules(): Schedule[] {
    const { game, rate } = this.#scenario;
    const places = Array.from({ length: this.senders }, (_, place) => place);
    if (game === undefined) return [this.#schedule(rate, places)];
    return [this.#schedule(game.host, places.slice(0, 1)), this.#schedule(game.others, places.slice(1))];
  }

  #schedule(rate: number, places: number[]): Schedule {
    const { rooms, phase } = this.#scenario;
    const intervalMs = 1000 / rate;
    const moments: Schedule["moments"] = [];
    let random = 1;
    for (const [i, place] of places.entries())
      for (let room = 0; room < rooms; room++) {
        random = (random * 48271) % 0x7fffffff; // the same moments in every run, so that runs compare
        const part = {
          even: (i * rooms + room) / (rooms * places.length),
          random: random / 0x7fffffff,
          near: (room / rooms + NEAR * (random / 0x7fffffff)) % 1,
          room: room / rooms,
          all: 0,
        }[phase];
        moments.push({ room, place, atMs: part * intervalMs });
      }
    return { intervalMs, moments: moments.sort((a, b) => a.atMs - b.atMs) };
  }
}
