/** Attackers by the hundred: raw members whose frames are counted as they come and kept nowhere. */
import { clientFrame, RawSocket } from "../../shared/sockets.ts";
import { until } from "../../shared/wait.ts";

/** Where the attackers say they are from, if the relay believes it. */
export const STRANGER = { "X-Forwarded-For": "203.0.113.7" };
/** Where their neighbours are from. */
export const HONEST = { "X-Forwarded-For": "192.0.2.1" };
/** What a `MAX_MESSAGES_PER_SECOND` of 200 lets through at once, less what sitting down costs. */
export const BURST = 390;

const AT_ONCE = 64; // connections that are made at a time: more, and the listening socket's queue overflows
const MEET_MS = 30_000; // 800 who join tell each other 320,000 times
const PONG = clientFrame("", { opcode: 10 });
const PING_OPCODE = 9;

/** Counts a server's text frames in a stream, whatever pieces it comes in. */
export class FrameCounter {
  count = 0;
  #skip = 0; // bytes of the last frame that are still to come
  #rest: Buffer = Buffer.alloc(0);

  /** @param onText takes the payload of each text frame; such frames are kept until they are whole */
  constructor(
    readonly onPing: () => void,
    public onText?: (payload: Buffer) => void,
  ) {}

  take(piece: Buffer): void {
    const bytes = this.#rest.length === 0 ? piece : Buffer.concat([this.#rest, piece]);
    let at = this.#skip;
    while (at + 2 <= bytes.length) {
      const opcode = (bytes[at] as number) & 15;
      const short = (bytes[at + 1] as number) & 127;
      const head = short === 126 ? 4 : short === 127 ? 10 : 2;
      if (at + head > bytes.length) break;
      const length = short === 126 ? bytes.readUInt16BE(at + 2) : short === 127 ? Number(bytes.readBigUInt64BE(at + 2)) : short;
      if (this.onText !== undefined && at + head + length > bytes.length) break;
      if (opcode === 1) {
        this.count++;
        this.onText?.(bytes.subarray(at + head, at + head + length));
      } else if (opcode === PING_OPCODE) this.onPing();
      at += head + length;
    }
    this.#skip = Math.max(0, at - bytes.length);
    this.#rest = at < bytes.length ? bytes.subarray(at) : Buffer.alloc(0);
  }
}

/** A raw socket that answers pings and counts the frames that it gets. */
export class Member {
  /** Whether the relay, or the network, has ended its socket. */
  isGone = false;
  /** Where it sits, if it does. */
  room = "";
  index = -1;
  readonly frames: FrameCounter;
  #sips = false;

  private constructor(readonly raw: RawSocket) {
    this.frames = new FrameCounter(() => raw.write(PONG));
    void raw.closed.then(() => (this.isGone = true));
  }

  /** Connects. @throws if the upgrade is refused */
  static async open(url: string, headers: Record<string, string> = STRANGER): Promise<Member> {
    const member = new Member(await RawSocket.open(url, "/", headers));
    member.#count();
    return member;
  }

  /** Connects, and sits down with a `create` or `join`. @throws if that is refused */
  static async sit(url: string, message: object, headers: Record<string, string> = STRANGER): Promise<Member> {
    const member = new Member(await RawSocket.open(url, "/", headers));
    member.raw.send(message);
    const answer = await member.raw.next();
    if (answer.type !== "created" && answer.type !== "joined") throw new Error(`sitting down was answered by ${answer.message}`);
    member.room = answer.room;
    member.index = answer.index;
    member.#count();
    return member;
  }

  /** Reads what the kernel has, once, and nothing more. */
  sip(): void {
    this.#sips = true;
    this.raw.resume();
  }

  #count(): void {
    this.raw.skim((bytes) => {
      if (this.#sips) this.raw.pause();
      this.frames.take(bytes);
    });
  }

  /** Says from time to time that it is alive, also while it reads nothing. */
  breathe(): void {
    const timer = setInterval(() => (this.isGone ? clearInterval(timer) : this.raw.write(PONG)), 5_000);
    timer.unref();
  }
}

/** Makes `n` of something, some at a time. */
export async function many<T>(n: number, make: (i: number) => Promise<T>): Promise<T[]> {
  const all: T[] = [];
  while (all.length < n) {
    const next = Array.from({ length: Math.min(AT_ONCE, n - all.length) }, (_, i) => make(all.length + i));
    all.push(...(await Promise.all(next)));
  }
  return all;
}

/** A room of `size` members, and until they have all heard of each other, nobody else does anything. */
export async function crowd(url: string, size: number, headers?: Record<string, string>): Promise<Member[]> {
  const host = await Member.sit(url, { type: "create", clientId: crypto.randomUUID(), maxClients: 1000 }, headers);
  const { room } = host;
  const guests = await many(size - 1, () => Member.sit(url, { type: "join", clientId: crypto.randomUUID(), room }, headers));
  const members = [host, ...guests];
  const met = () => members.every(({ frames, index }) => frames.count === size - 1 - index);
  await until("everybody to have heard of everybody", met, MEET_MS);
  for (const { frames } of members) frames.count = 0;
  return members;
}

/** The bytes of numbered broadcasts, with so much beside the number. */
export function flood(frames: number, padding = ""): Buffer {
  const text = (n: number) => `{"type":"send","data":${padding === "" ? n : JSON.stringify([n, padding])}}`;
  return Buffer.concat(Array.from({ length: frames }, (_, n) => clientFrame(text(n))));
}

/** Notes whatever a member hears that isn't the next number of its sender. @returns the faults, as they come */
export function watchOrder({ frames }: Member): string[] {
  const faults: string[] = [];
  const next = new Map<number, number>();
  frames.onText = (payload) => {
    const { type, from, data } = JSON.parse(payload.toString());
    if (type !== "message") return;
    const expected = next.get(from) ?? 0;
    if (data !== expected && faults.length < 10) faults.push(`${data} of ${from} came in place of ${expected}`);
    next.set(from, data + 1);
  };
  return faults;
}
