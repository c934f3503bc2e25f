/**
 * The members of the rooms: they connect, read, answer pings, and write what they are given. They have a WebSocket of their own, and
 * not the raw sockets of the tests: a relay that fills its core makes over a million deliveries a second, and one core has to take
 * them all. So no frame is copied, no text decoded and no JSON parsed: of a delivery only the header is looked at.
 */
import type { Socket } from "bun";
import { handshake } from "../shared/sockets.ts";
import type { Ledger } from "./ledger.ts";
import type { Progress } from "./progress.ts";
import type { Scenario } from "./options.ts";
import type { Server } from "./target.ts";
import { CLOSE, dataText, findHeader, HEADER, microsNow, PING, plainFrame, PONG, TEXT, textFrame } from "./wire.ts";

const HANDSHAKE_END = Buffer.from("\r\n\r\n");
const CONNECTS_AT_ONCE = 100; // below the 512 that a listen queue commonly holds
const MAX_ERRORS = 5;

/** Frames to write at once, all alike but for their headers. */
export type Batch = { bytes: Buffer; frameSize: number; headerAt: number };

/** One connection of one member. A reconnect is a new one with the same id. */
export class Member {
  socket: Socket<Member> | undefined;
  slot = -1;
  sent = 0;
  /** What it sends, once it sends. */
  batch: Batch | undefined;
  /** After the handshake. */
  open = false;
  expectsClose = false;
  /** Until a close frame says otherwise. */
  closeCode = 1006;
  /** What the socket didn't take yet. */
  unwritten: Buffer | undefined;
  /** Of a frame that isn't complete. */
  parts: Buffer[] = [];
  partsSize = 0;
  /** What that frame needs, as far as known. */
  frameSize = 0;
  /** Of a message whose rest is still to come. */
  header: Buffer | undefined;
  /** That rest, in bytes. */
  toSkip = 0;
  readonly joined = Promise.withResolvers<void>();

  /** @param id the room's first id + its place in the room */
  constructor(
    readonly id: number,
    readonly place: number,
    readonly room: Room,
  ) {
    this.joined.promise.catch(() => {}); // of many that fail together, only the first is waited for
  }
}

export class Room {
  code = "";
  readonly members: Member[] = [];
  /** Deliveries still to come. */
  outstanding = 0;
  /** Which sender is next, if the room is saturated. */
  turn = 0;

  constructor(readonly firstId: number) {}
}

/** All members of all rooms. */
export class Members {
  readonly rooms: Room[] = [];
  readonly all: Member[] = [];
  /** Sockets that the server closed, by code. */
  readonly closed: Record<string, number> = {};
  /** Refusals and broken frames, the first few. */
  readonly errors: string[] = [];
  /** How many rooms each relay has made, by its instance id. */
  readonly roomsOf: Record<string, number> = {};
  /** Called after each read, with the room of whoever has read. */
  onRead: ((room: Room) => void) | undefined;
  readonly #url: URL;
  readonly #wantsCode: boolean;
  readonly #ledger: Ledger;
  readonly #clients: number;
  readonly #headerInData: number;
  readonly #handlers;

  constructor({ url, wantsCode }: Server, { rooms, idleRooms, clients, payload }: Scenario, ledger: Ledger) {
    this.#url = url;
    this.#wantsCode = wantsCode;
    this.#ledger = ledger;
    this.#clients = clients;
    this.#headerInData = dataText(payload, 0).indexOf(HEADER);
    for (let firstId = 0; firstId < (rooms + idleRooms) * clients; firstId += clients) {
      const room = new Room(firstId);
      this.rooms.push(room);
      for (let place = 0; place < clients; place++) room.members.push(new Member(firstId + place, place, room));
      this.all.push(...room.members);
    }
    this.#handlers = {
      open: (socket: Socket<Member>) => this.#handshake(socket),
      data: (socket: Socket<Member>, bytes: Buffer) => this.#receive(socket.data, bytes),
      drain: (socket: Socket<Member>) => this.#flush(socket.data),
      close: (socket: Socket<Member>) => this.#closedBy(socket.data),
      error: (socket: Socket<Member>, error: Error) => this.#fail(socket.data, error.message),
      connectError: (socket: Socket<Member>, error: Error) => this.#fail(socket.data, error.message),
    };
  }

  /** Connects all: creators first, then the others room after room, so that every server sees the same order. */
  async connect(progress: Progress): Promise<void> {
    let done = 0;
    for (const group of [this.all.filter(({ place }) => place === 0), this.all.filter(({ place }) => place > 0)]) {
      let index = 0;
      const worker = async () => {
        for (let member; (member = group[index++]);) {
          await this.#connect(member);
          progress.show("connecting", ++done, this.all.length);
        }
      };
      await Promise.all(Array.from({ length: CONNECTS_AT_ONCE }, worker));
    }
    progress.clear();
  }

  /** As after a Wi-Fi drop-out: the old sockets are still open when the same clientIds come back, all at once. */
  async flap(count: number): Promise<void> {
    await Promise.all(
      this.all.slice(0, count).map(async (old) => {
        old.expectsClose = true;
        const member = new Member(old.id, old.place, old.room);
        this.all[old.id] = member;
        old.room.members[old.place] = member;
        await this.#connect(member);
        if (member.slot !== old.slot) this.#error(`slot ${old.slot} came back as ${member.slot}`);
      }),
    );
  }

  /** Writes bytes, which may be reused at once: what the socket doesn't take is copied. */
  write(member: Member, bytes: Buffer, size = bytes.length): void {
    if (!member.socket) return;
    if (member.unwritten) {
      member.unwritten = Buffer.concat([member.unwritten, bytes.subarray(0, size)]);
      return;
    }
    const written = Math.max(0, member.socket.write(bytes, 0, size));
    if (written < size) member.unwritten = Buffer.from(bytes.subarray(written, size));
  }

  /** Ends all connections. */
  end(): void {
    for (const member of this.all) {
      member.expectsClose = true;
      member.socket?.terminate();
    }
  }

  async #connect(member: Member): Promise<void> {
    const { hostname, port, protocol } = this.#url;
    const secure = /^(wss|https):$/.test(protocol);
    await Bun.connect<Member>({
      hostname: hostname.replace(/^\[|\]$/g, ""),
      port: Number(port || (secure ? 443 : 80)),
      tls: secure,
      data: member,
      socket: this.#handlers,
    });
    await member.joined.promise;
  }

  #handshake(socket: Socket<Member>): void {
    socket.data.socket = socket;
    socket.setNoDelay(true);
    const { pathname, search, host } = this.#url;
    const path = this.#wantsCode ? `/${socket.data.room.code}` : pathname + search;
    socket.write(handshake(path, { Host: host }));
  }

  /** Takes the answer to the handshake; gives what follows it, or undefined while it isn't complete. */
  #upgraded(member: Member, bytes: Buffer): Buffer | undefined {
    member.parts.push(bytes);
    const answer = Buffer.concat(member.parts);
    const end = answer.indexOf(HANDSHAKE_END);
    if (end < 0) return undefined;
    member.parts = [];
    const status = answer.toString("latin1", 0, answer.indexOf("\r\n"));
    if (!/^HTTP\/1\.1 101\b/.test(status)) {
      this.#fail(member, `no upgrade: ${status}`);
      return undefined;
    }
    member.open = true;
    const clientId = `load-${member.id}`;
    const room = member.room.code;
    const hello = room ? { type: "join", clientId, room } : { type: "create", clientId, maxClients: this.#clients };
    this.write(member, textFrame(JSON.stringify(hello)));
    return answer.subarray(end + HANDSHAKE_END.length);
  }

  #closedBy(member: Member): void {
    member.socket = undefined;
    if (member.expectsClose) return;
    const code = String(member.closeCode);
    this.closed[code] = (this.closed[code] ?? 0) + 1;
    member.joined.reject(new Error(`closed with ${code} before it had joined`));
  }

  #fail(member: Member, message: string): void {
    this.#error(message);
    member.joined.reject(new Error(message));
  }

  #error(message: string): void {
    if (this.errors.length < MAX_ERRORS) this.errors.push(message);
  }

  #flush(member: Member): void {
    const bytes = member.unwritten;
    if (!bytes) return;
    member.unwritten = undefined;
    this.write(member, bytes);
  }

  /** Takes what a read brought: any number of frames, the first and the last perhaps in part. */
  #receive(member: Member, bytes: Buffer): void {
    if (!member.open) {
      const rest = this.#upgraded(member, bytes);
      if (!rest) return;
      bytes = rest;
    }
    const now = microsNow();
    let at = 0;
    if (member.toSkip > 0) {
      at = member.toSkip;
      member.toSkip -= Math.min(at, bytes.length);
      if (member.toSkip > 0) return;
      this.#ledger.deliver(member, member.header as Buffer, 0, now);
    } else if (member.partsSize > 0) {
      member.parts.push(bytes);
      member.partsSize += bytes.length;
      if (member.partsSize < member.frameSize) return;
      bytes = Buffer.concat(member.parts);
      member.parts = [];
      member.partsSize = 0;
    }
    while (at < bytes.length) {
      const left = bytes.length - at;
      member.frameSize = 2;
      if (left < 2) break;
      let size = (bytes[at + 1] as number) & 0x7f;
      let start = at + 2;
      if (size >= 126) {
        start += size === 126 ? 2 : 8;
        member.frameSize = start - at;
        if (left < member.frameSize) break;
        size = size === 126 ? bytes.readUInt16BE(at + 2) : Number(bytes.readBigUInt64BE(at + 2));
      }
      const end = start + size;
      member.frameSize = end - at;
      const first = bytes[at] as number;
      const header = first === (0x80 | TEXT) ? findHeader(bytes, start, end, this.#headerInData) : -1;
      if (end > bytes.length) {
        if (header < 0) break;
        // Of a payload only the header is of interest: the rest is counted, not kept.
        member.header = Buffer.from(bytes.subarray(header, header + HEADER.length));
        member.toSkip = end - bytes.length;
      } else if (header >= 0) this.#ledger.deliver(member, bytes, header, now);
      else if (first === (0x80 | TEXT)) this.#answer(member, bytes.toString("utf8", start, end));
      else this.#control(member, first, bytes.subarray(start, end));
      at = end;
    }
    if (at < bytes.length) {
      member.parts.push(bytes.subarray(at));
      member.partsSize = bytes.length - at;
    }
    this.onRead?.(member.room);
  }

  /** Frames other than a final text frame. */
  #control(member: Member, first: number, payload: Buffer): void {
    if (first === (0x80 | PING)) this.write(member, plainFrame(PONG, payload));
    else if (first === (0x80 | CLOSE)) {
      if (payload.length >= 2) member.closeCode = payload.readUInt16BE(0);
      this.write(member, plainFrame(CLOSE, payload.subarray(0, 2)));
      member.socket?.end();
    } else if (first !== (0x80 | PONG)) this.#error(`unexpected frame 0x${first.toString(16)}`);
  }

  /** What the relay says itself. */
  #answer(member: Member, text: string): void {
    const message = JSON.parse(text);
    if (message.type === "created" || message.type === "joined") {
      member.slot = message.index;
      if (message.type === "created") {
        const { room, instance = "" } = message;
        member.room.code = room;
        this.roomsOf[instance] = (this.roomsOf[instance] ?? 0) + 1;
      }
      member.joined.resolve();
    } else if (message.type === "error") this.#fail(member, message.message);
  }
}
