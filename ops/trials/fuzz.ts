/**
 * Hostile clients: random valid, invalid and truncated requests, handshakes, frames and messages from raw TCP sockets, against
 * a relay that other rooms use meanwhile.
 *
 *     bun run ops/trials/fuzz.ts --seconds 60 --seed 7 [--url http://localhost:3000]
 *
 * Without `--url` it starts a relay of its own, with caps that are small enough to be reached. It exits with 1 and a list of
 * faults unless, at the end, the relay lives, the other rooms' messages all arrived in order, no room, member or socket is
 * left, and memory is where it was after the warm-up. The same seed makes the same attacks; only their timing differs.
 * `ops/trials/soak.ts` puts parties through the same trial.
 */
import type { ClientMessage, ServerMessage } from "../../server.ts";
import type { Random } from "../shared/random.ts";
import { clientFrame, handshake, RawSocket } from "../shared/sockets.ts";
import { PATIENCE_MS } from "../shared/wait.ts";
import { type Arena, main, trial, type Trial, type Where } from "./trial.ts";

type Attack = (arena: Arena, raw: RawSocket) => Promise<void>;

/** How often each type is sent, compared with the others. The type checker asks for each of them, as for the answers. */
const WEIGHTS: Record<ClientMessage["type"], number> = {
  create: 1,
  join: 1,
  send: 4,
  set_state: 1,
  close_room: 1,
  set_room: 1,
  kick: 1,
  set_host: 1,
  offer_slot: 1,
  leave: 1,
  ping: 1,
};
const TYPES = Object.entries(WEIGHTS).flatMap(([type, weight]) => Array<string>(weight).fill(type));
const ANSWERS: Record<ServerMessage["type"], true> = {
  created: true,
  joined: true,
  peer_joined: true,
  peer_left: true,
  message: true,
  state: true,
  room: true,
  host: true,
  slot_offer: true,
  left: true,
  pong: true,
  draining: true,
  error: true,
};

/** JSON texts that somebody may not have thought of. */
const HOSTILE = [
  ...["null", "true", "false", "0", "-0", "-1", "1", "1.5", "1e400", "1e308", "9007199254740993", '""', '"x"', "[]", "{}"],
  ...['"\\ud800"', '"\\u0000"', '"é😀"', '"__proto__"', '"constructor"', '"toString"', "[0]", "[0,0,1,2,3]", "[[]]", "[-1]"],
  ...['{"toString":1}', '{"__proto__":{"index":0}}', '"{room}"', '"https://{room}.example/{instance}"', '"javascript:1"'],
  JSON.stringify("long".repeat(40)),
  JSON.stringify('\\"'.repeat(9_000)),
  JSON.stringify(Array.from({ length: 100 }, (_, i) => i)),
  "[".repeat(3_000) + "]".repeat(3_000),
  '{"a":'.repeat(1_000) + "1" + "}".repeat(1_000),
];

/** A message that is right, or nearly. */
function message({ random, rooms }: Arena): string {
  const fields: Record<string, () => string> = {
    clientId: () => JSON.stringify(`c${random.below(9)}`),
    maxClients: () => String(1 + random.below(8)),
    linger: () => String(random.below(2)), // longer, and the rooms outlive the trial
    hostGrace: () => random.pick(["0", "1"]),
    migrate: () => String(random.chance(0.5)),
    url: () => '"https://example.com/{room}?at={instance}"',
    room: () => JSON.stringify(random.pick(rooms)),
    data: () => random.pick(HOSTILE),
    to: () => random.pick(["0", "1", "[0,1,2]", "7"]),
    echo: () => "true",
    claim: () => JSON.stringify("A".repeat(22)),
    index: () => String(random.below(4)),
    locked: () => String(random.chance(0.2)),
    t: () => String(random.next()),
  };
  const type = random.pick(TYPES);
  const needed: Record<string, string[]> = {
    create: ["clientId", "maxClients"],
    join: ["clientId", "room"],
    send: ["data"],
    set_state: ["data"],
    kick: ["index"],
    set_host: ["index"],
  };
  const names = [...(needed[type] ?? []), ...Object.keys(fields).filter(() => random.chance(0.1))];
  const members = names.map((name) => {
    const value = random.chance(0.1) ? random.pick(HOSTILE) : (fields[name] as () => string)();
    return `${JSON.stringify(name)}${space(random)}:${space(random)}${value}`;
  });
  const typeText = random.chance(0.05) ? random.pick(HOSTILE) : JSON.stringify(type);
  members.splice(random.chance(0.7) ? 0 : random.below(members.length + 1), 0, `"type":${typeText}`);
  const text = `{${members.join(`,${space(random)}`)}}`;
  if (random.chance(0.03)) return text.slice(0, random.below(text.length));
  if (random.chance(0.06)) return random.pick(HOSTILE);
  return text;
}

function space(random: Random): string {
  return random.chance(0.9) ? "" : random.pick([" ", "\n\t", "\r\n", " ".repeat(40), "\u00a0"]);
}

/** A frame of any kind. */
function anyFrame(arena: Arena): Buffer {
  const { random } = arena;
  const text = message(arena);
  switch (random.below(14)) {
    case 0:
      return clientFrame(random.bytes(random.below(300)), { opcode: random.below(16) });
    case 1:
      return clientFrame(text, { mask: false });
    case 2:
      return clientFrame(text, { reserved: 1 + random.below(7) });
    case 3: {
      const at = random.below(text.length);
      const inner = random.chance(0.5) ? [clientFrame("between", { opcode: 9 })] : [];
      const last = clientFrame(text.slice(at), { opcode: random.chance(0.9) ? 0 : 1 });
      return Buffer.concat([clientFrame(text.slice(0, at), { fin: false }), ...inner, last]);
    }
    case 4: // control frames: at most 125 bytes and never in parts
      return clientFrame(random.bytes(random.below(200)), { opcode: 8 + random.below(8), fin: random.chance(0.7) });
    case 5: {
      const wrong = random.pick([0, 1, 125, 126, 65535, 65536, 2 ** 31, 2n ** 63n, 2n ** 64n - 1n]);
      return clientFrame(text, { length: wrong, lengthBytes: random.pick([2, 8] as const) });
    }
    case 6: {
      const bad = [[0xff], [0xc0, 0x80], [0xed, 0xa0, 0x80], [0xf5, 0x80, 0x80, 0x80], [0xe2, 0x82]];
      return clientFrame(Buffer.concat([Buffer.from(text), Buffer.from(random.pick(bad))]));
    }
    case 7: {
      const code = random.pick([0, 999, 1000, 1004, 1005, 1006, 1015, 2999, 3000, 4000, 4999, 65535]);
      const payload = Buffer.concat([Buffer.from([code >> 8, code & 255]), random.bytes(random.below(130))]);
      return clientFrame(payload.subarray(0, random.below(payload.length)), { opcode: 8 });
    }
    case 8:
      return clientFrame("x".repeat(random.pick([16_384, 65_535, 65_537, 300_000])));
    case 9:
      return Buffer.concat(Array.from({ length: 50 }, () => clientFrame("", { opcode: random.pick([9, 10]) })));
    default:
      return clientFrame(text);
  }
}

/** Changes bytes at random. */
function mutate(random: Random, bytes: Buffer): Buffer {
  const copy = Buffer.from(bytes);
  for (let i = random.below(4); i > 0 && copy.length > 0; i--) {
    const at = random.below(copy.length);
    copy[at] = (copy[at] as number) ^ (1 << random.below(8));
  }
  return random.chance(0.3) ? copy.subarray(0, random.below(copy.length + 1)) : copy;
}

/** Sends bytes whole or in parts. */
async function dribble(random: Random, raw: RawSocket, bytes: Buffer): Promise<void> {
  let from = 0;
  for (let parts = random.below(5); parts > 0; parts--) {
    const to = from + random.below(bytes.length - from + 1);
    raw.write(bytes.subarray(from, to));
    from = to;
    await Bun.sleep(random.below(3));
  }
  raw.write(bytes.subarray(from));
}

/** Stays for a while, or until the relay has had enough. */
async function stay(raw: RawSocket, ms: number): Promise<void> {
  await Promise.race([raw.closed, Bun.sleep(ms)]);
}

/** Reads to the end what the relay said, all of which must be messages of its own. */
async function readAnswers(raw: RawSocket, fault: Arena["fault"]): Promise<void> {
  for (let frame = await raw.nextFrame(); frame !== undefined; frame = await raw.nextFrame()) {
    if (frame.opcode !== 1) continue;
    const text = frame.payload.toString();
    try {
      const { type } = JSON.parse(text) as { type: string };
      if (!Object.hasOwn(ANSWERS, type)) fault(`sent a message that isn't its own: ${text.slice(0, 300)}`);
    } catch {
      fault(`sent no JSON: ${text.slice(0, 300)}`);
    }
  }
}

/** Upgrades. @returns whether that went well */
async function upgrade({ random }: Arena, raw: RawSocket): Promise<boolean> {
  raw.write(handshake("/", identity(random)));
  return (await raw.head()).startsWith("HTTP/1.1 101 ");
}

/** Says to be from anywhere. */
function identity(random: Random): Record<string, string> {
  const addresses = ["10.0.0.1", `10.1.${random.below(256)}.${random.below(256)}`, `2001:db8:${random.below(9999)}::1`];
  const origins = ["https://game.example", "null", `https://${random.below(2000)}.example`, "x".repeat(300), 'é"\\'];
  return { "X-Forwarded-For": random.pick([...addresses, "unknown", "1.2.3.4, 10.2.0.1"]), Origin: random.pick(origins) };
}

const TARGETS = [
  ...["/", "/health", "/metrics", "/room/", "/room/%", "/room/%00", "/room/111111", "/room/a/b", "//evil.example/%2e%2e"],
  ...[
    "/\\evil.example",
    "*",
    "http://evil.example/health",
    "?",
    "/?instance=abc;app=other",
    "/?instance=",
    "/#",
    "/é",
    "relay:1",
  ],
  `/${"a".repeat(4_000)}`,
  `/${"/".repeat(40_000)}`,
  `/?${"a=1&".repeat(1_000)}`,
];
const METHODS = "GET GET GET HEAD OPTIONS POST PUT DELETE TRACE CONNECT PATCH get PRI X-ODD".split(" ");
const HEADERS: readonly (readonly [string, readonly string[]])[] = [
  ["Host", ["", "a b", "[::1", "[::1]:99999", "x:99999999", "é", "a/b?c#d", "@", "a\\b", "%", "x".repeat(5_000)]],
  ["Origin", ["", "null", "https://a.example", "x".repeat(20_000), '"\\\t', "é"]],
  ["Upgrade", ["", "websocket", "WEBSOCKET", "h2c", "websocket, h2c", "websocket/13"]],
  ["Connection", ["", "close", "keep-alive", "Upgrade, close", "upgrade"]],
  ["Sec-WebSocket-Key", ["", "x", "dGhlIHNhbXBsZSBub25jZQ==", "x".repeat(300)]],
  ["Sec-WebSocket-Version", ["", "8", "13", "99"]],
  ["Sec-WebSocket-Extensions", ["permessage-deflate", "permessage-deflate; client_max_window_bits=99", ";;,="]],
  ["Sec-WebSocket-Protocol", ["a", "a, b", ",,,"]],
  ["Content-Length", ["0", "5", "-1", "99999999999999999999", "1, 1", "x"]],
  ["Transfer-Encoding", ["chunked", "gzip, chunked", "identity", "xchunked"]],
  ["Expect", ["100-continue", "x"]],
  ["fly-replay-src", ["instance=a;region=b", ""]],
  ["fly-replay-failed", ["x"]],
  ["X-Party-Probe", ["1", "2"]],
  ["X-Forwarded-For", ["", ",", "1.2.3.4", "::ffff:1.2.3.4", "fe80::1%eth0", "x".repeat(1_000)]],
];

const ATTACKS: Record<string, Attack> = {
  /** Bytes that are no HTTP. */
  async garbage({ random }, raw) {
    await dribble(random, raw, random.bytes(random.below(2_000)));
    await stay(raw, random.below(100));
  },

  /** Requests with odd methods, targets and headers, some of them upgrades. */
  async requests({ random, fault }, raw) {
    let text = "";
    for (let n = 1 + random.below(8); n > 0; n--) {
      const headers = HEADERS.flatMap(([name, values]) => (random.chance(0.08) ? [`${name}: ${random.pick(values)}`] : []));
      if (random.chance(0.7)) headers.unshift("Host: relay");
      const version = random.chance(0.95) ? "HTTP/1.1" : random.pick(["HTTP/1.0", "HTTP/2.0", "HTTP/9", ""]);
      const end = random.chance(0.9) ? "\r\n\r\n" : random.pick(["\r\n", "\n\n", "", "\r\n \r\n\r\n"]);
      text += `${random.pick(METHODS)} ${random.pick(TARGETS)} ${version}\r\n${headers.join("\r\n")}${end}`;
      if (random.chance(0.1)) text += random.pick(["hello", "5\r\nhello\r\n0\r\n\r\n", "FFFFFFFFFFFFFFFFF\r\n", "-1\r\n"]);
    }
    await dribble(random, raw, Buffer.from(text));
    await stay(raw, 20 + random.below(50));
    const answer = raw.received.toString("latin1");
    if (/^HTTP\/1\.1 50[0-4]/m.test(answer) || /<html|<!doctype/i.test(answer))
      fault(`answered ${JSON.stringify(answer.slice(0, 200))} to ${JSON.stringify(text.slice(0, 2_000))}`);
  },

  /** A handshake that is cut short, or changed, or stays half open. */
  async handshakes({ random }, raw) {
    await dribble(random, raw, mutate(random, Buffer.from(handshake("/", identity(random)))));
    await stay(raw, random.below(300));
  },

  /** Frames of every kind, right and wrong. */
  async frames(arena, raw) {
    const { random } = arena;
    if (!(await upgrade(arena, raw))) return;
    const frames = Buffer.concat(Array.from({ length: 1 + random.below(12) }, () => anyFrame(arena)));
    await dribble(random, raw, random.chance(0.3) ? mutate(random, frames) : frames);
    await stay(raw, random.below(60));
  },

  /** Messages, most of them right, of a host and guests who come and go. */
  async messages(arena, raw) {
    const { random, url, rooms } = arena;
    const crew = [raw, ...(await Promise.all([1, 2, 3].map(() => RawSocket.connect(url))))];
    try {
      for (const one of crew) if (!(await upgrade(arena, one))) return;
      raw.send({ type: "create", clientId: "c0", maxClients: 2 + random.below(3), linger: random.below(2) });
      const { room } = await raw.next();
      if (room !== undefined && rooms.push(room) > 3) rooms.splice(1, 1); // the first is the bystanders'
      for (const guest of crew.slice(1))
        guest.send({ type: "join", clientId: `c${random.below(9)}`, room: room ?? random.pick(rooms) });
      for (let n = random.below(20); n > 0; n--) {
        random.pick(crew).send(...Array.from({ length: 1 + random.below(10) }, () => message(arena)));
        await Bun.sleep(random.below(4));
      }
      for (const one of crew) one.end();
      for (const one of crew) await readAnswers(one, arena.fault);
    } finally {
      for (const one of crew) one.reset();
    }
  },

  /** A handshake with frames right behind it, or with a body. */
  async impatience(arena, raw) {
    const { random } = arena;
    const frames = Array.from({ length: random.below(5) }, () => anyFrame(arena));
    await dribble(random, raw, Buffer.concat([Buffer.from(handshake("/", identity(random))), ...frames]));
    await stay(raw, random.below(60));
  },

  /** Far more messages than the limit, in one write. */
  async floods(arena, raw) {
    const { random, rooms } = arena;
    if (!(await upgrade(arena, raw))) return;
    const { send, ping } = { send: { type: "send", data: random.next() }, ping: { type: "ping" } };
    raw.send({ type: "join", clientId: `c${random.below(40)}`, room: random.pick(rooms) });
    raw.send(...Array.from({ length: random.pick([600, 4_200, 5_000]) }, () => (random.chance(0.1) ? send : ping)));
    if (random.chance(0.5)) raw.pause();
    await stay(raw, random.below(400));
  },

  /** A room whose guest stops reading while the host says a lot. */
  async slowReaders(arena, raw) {
    const { random, url } = arena;
    if (!(await upgrade(arena, raw))) return;
    raw.send({ type: "create", clientId: "host", maxClients: 2 });
    const { room } = await raw.next();
    if (room === undefined) return;
    const guest = await RawSocket.connect(url);
    try {
      if (!(await upgrade(arena, guest))) return;
      guest.send({ type: "join", clientId: "guest", room });
      await guest.nextFrame();
      guest.pause();
      const data = "x".repeat(60_000);
      raw.send(...Array.from({ length: random.pick([20, 200]) }, () => ({ type: "send", data })));
      await stay(raw, random.below(300));
      if (random.chance(0.5)) guest.resume();
      await stay(raw, random.below(50));
    } finally {
      guest.reset();
    }
  },

  /** A slot is offered again and again, and many devices reach for it at once: one of them has it in the end. */
  async claims(arena, raw) {
    const { random, url, fault } = arena;
    const crew = [raw, ...(await Promise.all([1, 2, 3, 4].map(() => RawSocket.connect(url))))];
    try {
      for (const one of crew) if (!(await upgrade(arena, one))) return;
      raw.send({ type: "create", clientId: "host", maxClients: 2 });
      const { room } = await raw.next();
      if (room === undefined) return;
      const [guest, ...others] = crew.slice(1) as [RawSocket, ...RawSocket[]];
      guest.send({ type: "join", clientId: "guest", room });
      if ((await guest.next()).type !== "joined") return; // its address has guessed too often
      const offers = Array.from({ length: 1 + random.below(40) }, () => ({ type: "offer_slot", index: 1 }));
      raw.send({ type: "set_room", locked: random.chance(0.5) }, ...offers);
      const tokens: string[] = [];
      while (tokens.length < offers.length) {
        const { type, token } = await raw.next();
        if (type === "slot_offer") tokens.push(token);
      }
      if (random.chance(0.3)) random.chance(0.5) ? guest.end() : guest.reset();
      if (random.chance(0.1)) raw.send({ type: "kick", index: 1 });
      const claim = random.chance(0.9) ? tokens.at(-1) : random.pick(tokens);
      for (const [i, other] of others.entries()) other.send({ type: "join", clientId: `d${i}`, room, claim });
      const answers = await Promise.all(others.map((other) => other.next()));
      if (answers.filter(({ type }) => type === "joined").length > 1) fault(`a claim was good twice: ${JSON.stringify(answers)}`);
      for (const one of crew) one.end();
      for (const one of crew) await readAnswers(one, fault);
    } finally {
      for (const one of crew) one.reset();
    }
  },

  /** Who says more than its bucket holds, and hangs up in the same breath: what waits is handled by a socket that is closed. */
  async goodbyes(arena, raw) {
    const { random, rooms } = arena;
    if (!(await upgrade(arena, raw))) return;
    const create = { type: "create", clientId: "c0", maxClients: 2, linger: random.below(2) };
    const join = { type: "join", clientId: `c${random.below(9)}`, room: random.pick(rooms) };
    const acts = [create, join, { type: "leave" }, { type: "send", data: 1 }, { type: "ping" }, { type: "close_room" }];
    const pings = Array.from({ length: random.pick([0, 4_000, 5_000]) }, () => '{"type":"ping"}');
    const last = Array.from({ length: random.below(8) }, () => random.pick(acts));
    const close = clientFrame(Buffer.from([0x03, 0xe8]), { opcode: 8 });
    const texts = [...pings, ...last.map((act) => JSON.stringify(act))];
    raw.write(Buffer.concat([...texts.map((text) => clientFrame(text)), close]));
    await stay(raw, random.below(300));
  },

  /** More sockets than the relay takes, roomless and idle. */
  async crowds({ random, url }, raw) {
    const crowd = await Promise.allSettled(Array.from({ length: 40 }, () => RawSocket.connect(url)));
    const there = crowd.flatMap((result) => (result.status === "fulfilled" ? [result.value] : []));
    for (const one of there) if (random.chance(0.9)) one.write(handshake());
    await stay(raw, random.below(300));
    for (const one of there) random.chance(0.5) ? one.end() : one.reset();
  },
};

/** Caps that the attacks reach, and the bystanders don't. */
const ENV = {
  MAX_MESSAGES_PER_SECOND: "2000",
  MAX_CONNECTIONS: "100",
  MAX_ROOMS: "9",
  ADDRESS_HEADER: "X-Forwarded-For",
};

/** Attacks a relay for so long. @returns what it did wrong */
export function fuzz(seconds: number, seed: number, log: Trial["log"], at: Where = {}): Promise<string[]> {
  return trial({
    ...{ name: "fuzz", seconds, seed, log, ...at, env: ENV, workers: 16 },
    async work(arena) {
      const { random, url, isOver, count, fault } = arena;
      while (!isOver()) {
        const [name, attack] = random.pick(Object.entries(ATTACKS));
        const raw = await RawSocket.connect(url);
        const late = setTimeout(() => {
          fault(`${name} got no answer for ${PATIENCE_MS / 1000} s`);
          raw.reset();
        }, PATIENCE_MS);
        try {
          await attack(arena, raw);
        } catch (error) {
          if (!(error as Error).message.startsWith("the connection ended")) throw error;
        } finally {
          clearTimeout(late);
          random.chance(0.5) ? raw.end() : raw.reset();
          count(name);
        }
      }
    },
  });
}

if (import.meta.main) await main(fuzz);
