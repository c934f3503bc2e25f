/**
 * What a hostile member, or visitor, can do who keeps within every limit. Each attack is a process of its own, started by
 * `ops/trials/siege.ts`: it gets everything into place, says `ready`, waits for `go`, and at the end prints what came of it.
 */
import { Client } from "../../shared/client.ts";
import { clientFrame, RawSocket } from "../../shared/sockets.ts";
import { BURST, crowd, flood, HONEST, many, Member, STRANGER, watchOrder } from "./crowd.ts";

/** What an attack is given. */
export type Siege = {
  url: string;
  /** How long it may last. */
  seconds: number;
  /** Says that all is in place; resolves when the attack may begin. */
  begin(): Promise<void>;
  /** Waits until it is so, or the time is over. @returns whether it came to that */
  until(look: () => boolean): Promise<boolean>;
};

/** What came of an attack, in words, and whether that is what the relay promises. */
export type Outcome = { text: string; held: boolean };

export type Attack = {
  /** One line for `--help`. */
  about: string;
  /** Seconds, if the command line names none. */
  seconds: number;
  /** The relay gets this much memory, as a container would give it. */
  memory?: number;
  /** It needs a relay on Fly.io, whose siblings are doubles. */
  siblings?: true;
  run(siege: Siege): Promise<Outcome>;
};

const CONTAINER = 256 * 1024 * 1024;
const LONG = "x".repeat(260_000); // a broadcast of it is just below the limit of 256 KiB
const MEDIUM = "x".repeat(60_000);
const NEARLY_FULL = 0.9; // of what a silent member endures: never over the limit
const ONE_READ = 1_980; // numbered frames that the relay reads at once: 64 KiB
const NOTICE_MS = 300; // in which those who read again have noticed the end of their socket
const RECONNECT_MS = 3_000;
const LINGER = 20; // seconds: rooms are there for as long as the attack, and gone when everything is looked at afterwards
const thousands = (n: number): string => Math.round(n).toLocaleString("en");
const secondsSince = (began: number): string => `${((performance.now() - began) / 1000).toFixed(1)} s`;
const goneOf = (members: Member[]): number => members.filter(({ isGone }) => isGone).length;
const joining = (room: string, clientId: string = crypto.randomUUID()) => ({ type: "join", clientId, room });
/** For attacks after which nothing but the relay and the neighbour is looked at. */
const nothingElse = (text: string): Outcome => ({ text, held: true });

/** Everybody writes at once, and is done when everybody has heard so many frames. */
async function atOnce(siege: Siege, writers: Member[], bytesOf: (member: Member) => Buffer, expected: number): Promise<Outcome> {
  const all = writers.map(bytesOf);
  await siege.begin();
  const began = performance.now();
  writers.forEach(({ raw }, i) => raw.write(all[i] as Buffer));
  const through = await siege.until(() => writers.every(({ frames, isGone }) => isGone || frames.count >= expected));
  const heard = writers.reduce((sum, { frames }) => sum + frames.count, 0);
  const cut = goneOf(writers);
  const share = through ? thousands(heard) : `${thousands(heard)} of ${thousands(expected * writers.length)}`;
  return {
    text: `${share} deliveries in ${secondsSince(began)}${cut > 0 ? `, ${cut} of the attackers cut` : ""}`,
    held: cut === 0,
  };
}

/** Members flood their own rooms, one of each room looks at the order. */
async function floods(siege: Siege, rooms: Member[][], frames = BURST): Promise<Outcome> {
  const [size = 0] = rooms.map(({ length }) => length);
  const faults = rooms.map(([witness]) => watchOrder(witness as Member));
  const bytes = flood(frames);
  const { text, held } = await atOnce(siege, rooms.flat(), () => bytes, frames * (size - 1));
  return { text: [text, ...faults.flat().slice(0, 1)].join(", "), held: held && faults.flat().length === 0 };
}

/** Lets `work` go on in so many lanes until the time is over. */
async function lanes(siege: Siege, n: number, work: (lane: number) => Promise<unknown>): Promise<void> {
  let isOver = false;
  const lane = async (_: unknown, i: number) => {
    while (!isOver) await work(i);
  };
  const all = Promise.all(Array.from({ length: n }, lane));
  await Promise.race([all, siege.until(() => false)]);
  isOver = true;
  all.catch(() => {}); // a lane may still wait, and nobody for it
}

const get = (path: string, headers: Record<string, string> = STRANGER): string =>
  `GET ${path} HTTP/1.1\r\nHost: relay\r\n${Object.entries(headers)
    .map(([name, value]) => `${name}: ${value}\r\n`)
    .join("")}\r\n`;

/** Sends requests without waiting for answers. @returns once all are answered, or the relay has closed the connection */
async function pipeline(url: string, requests: string[], take: (status: number) => void): Promise<void> {
  const raw = await RawSocket.connect(url);
  let tail = "";
  let answers = 0;
  const { promise, resolve } = Promise.withResolvers<void>();
  raw.skim((bytes) => {
    const text = tail + bytes.toString("latin1");
    let from = 0;
    for (const { 1: status, 0: line, index } of text.matchAll(/HTTP\/1\.1 (\d\d\d) /g)) {
      take(Number(status));
      answers++;
      from = index + line.length;
    }
    tail = text.slice(Math.max(from, text.length - "HTTP/1.1 200".length));
    if (answers >= requests.length) resolve();
  });
  raw.write(requests.join(""));
  await Promise.race([promise, raw.closed]);
  raw.reset();
}

/** Lets 120 invented origins of 250 backslashes be seen, each of which `/metrics` has to escape. */
async function inventOrigins(url: string): Promise<void> {
  await many(120, async (i) => {
    const raw = await RawSocket.open(url, "/", { ...STRANGER, Origin: `${"\\".repeat(250)}${i}` });
    raw.reset();
  });
}

/** How many frames of MEDIUM a member that doesn't read gets before it is cut: by the relay's buffer and the kernels'. */
async function endurance(url: string): Promise<number> {
  const host = await Client.open(url, STRANGER);
  const room = await host.create(2);
  const silent = await Member.sit(url, joining(room));
  silent.raw.pause();
  await host.next();
  for (let sent = 0; ; sent++) {
    const { type } = await host.ask({ type: "send", data: MEDIUM, echo: true });
    if (type === "message" && sent < 1_000) continue;
    silent.raw.reset();
    await host.close();
    return sent;
  }
}

/** A guess at a code of the same region: the first characters say which one. */
function guess(code: string, end = ""): string {
  const alphabet = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxy"; // codes that end with z are the siblings'
  const random = crypto.getRandomValues(new Uint32Array(4 - end.length));
  return code.slice(0, 2) + Array.from(random, (n) => alphabet[n % alphabet.length]).join("") + end;
}

export const ATTACKS: Record<string, Attack> = {
  burst: {
    about: "300 members of one room send their whole burst at once",
    seconds: 20,
    run: async (siege) => floods(siege, [await crowd(siege.url, 300)]),
  },

  rooms: {
    about: "twenty rooms of 40 flood at once",
    seconds: 10,
    run: async (siege) => floods(siege, await many(20, () => crowd(siege.url, 40))),
  },

  wake: {
    about: "sixty quiet rooms of 40 send at once, each member 149 frames",
    seconds: 10,
    run: async (siege) => floods(siege, await many(60, () => crowd(siege.url, 40)), 149),
  },

  targets: {
    about: "150 members of one room send their whole burst, to 64 others each",
    seconds: 20,
    async run(siege) {
      const members = await crowd(siege.url, 150);
      const bytesOf = ({ index }: Member) => {
        const to = Array.from({ length: 64 }, (_, i) => (index + 1 + i) % members.length);
        return Buffer.concat(Array<Buffer>(BURST).fill(clientFrame(JSON.stringify({ type: "send", to, data: 0 }))));
      };
      return atOnce(siege, members, bytesOf, BURST * 64);
    },
  },

  big: {
    about: "one member broadcasts 256 KiB 50 times a second to 300",
    seconds: 10,
    async run(siege) {
      const [sender, ...readers] = (await crowd(siege.url, 301)) as [Member, ...Member[]];
      const frame = flood(1, LONG);
      await siege.begin();
      let sent = 0;
      const timer = setInterval(() => {
        sender.raw.write(frame);
        sent++;
      }, 20);
      await siege.until(() => false);
      clearInterval(timer);
      const heard = readers.reduce((sum, { frames }) => sum + frames.count, 0);
      return nothingElse(`${sent} frames, ${thousands(heard)} deliveries, ${goneOf(readers)} readers fell behind and were cut`);
    },
  },

  resets: {
    about: "three members of a room of 800 fill their queue and reset, three times",
    seconds: 10,
    async run(siege) {
      const members = await crowd(siege.url, 800);
      const flooders = members.slice(-9);
      const [witness] = members as [Member];
      let heard = 0;
      let left = 0;
      witness.frames.onText = (payload) => (payload.includes('"peer_left"') ? left++ : heard++);
      const bytes = flood(ONE_READ);
      await siege.begin();
      for (let i = 0; i < flooders.length; i += 3) {
        const three = flooders.slice(i, i + 3);
        for (const { raw } of three) raw.write(bytes);
        await Bun.sleep(20); // the relay has read it by then
        for (const { raw } of three) raw.reset();
      }
      await siege.until(() => left >= flooders.length);
      // Most are heard, if at all, right away; what is beyond that is a queue which had to be discarded.
      const most = flooders.length * (BURST + 10);
      const text = `${thousands(heard)} of ${thousands(flooders.length * ONE_READ)} frames were heard, ${left} of ${flooders.length} peer_left`;
      return { text, held: left === flooders.length && heard <= most };
    },
  },

  presence: {
    about: "800 members of one room vanish at once",
    seconds: 10,
    async run(siege) {
      const [witness, ...others] = (await crowd(siege.url, 801)) as [Member, ...Member[]];
      await siege.begin();
      const began = performance.now();
      for (const { raw } of others) raw.reset();
      const all = await siege.until(() => witness.frames.count >= others.length);
      return { text: `${witness.frames.count} of ${others.length} peer_left came in ${secondsSince(began)}`, held: all };
    },
  },

  "leave-create": {
    about: "300 sockets create a room and leave it, as often as their burst allows",
    seconds: 10,
    async run(siege) {
      const sockets = await many(300, () => Member.open(siege.url));
      const pair = [{ type: "create", clientId: "a", maxClients: 1 }, { type: "leave" }];
      const bytes = Buffer.concat(Array<Buffer>(BURST / 2).fill(Buffer.concat(pair.map((m) => clientFrame(JSON.stringify(m))))));
      return atOnce(siege, sockets, () => bytes, BURST);
    },
  },

  creators: {
    about: "1,000 sockets from 200 addresses create a room at once, while 10,000 rooms linger",
    seconds: 10,
    async run(siege) {
      const create = { type: "create", clientId: "creator", maxClients: 1, linger: LINGER };
      await many(10_000, async () => (await Member.sit(siege.url, create)).raw.reset());
      const sockets = await many(1_000, (i) => Member.open(siege.url, { "X-Forwarded-For": `198.51.100.${i % 200}` }));
      return atOnce(siege, sockets, () => clientFrame(JSON.stringify(create)), 1);
    },
  },

  roomless: {
    about: "300 sockets in no room send their whole burst of nonsense, which is answered",
    seconds: 10,
    async run(siege) {
      const sockets = await many(300, () => Member.open(siege.url));
      const bytes = Buffer.concat(Array<Buffer>(BURST).fill(clientFrame("{")));
      return atOnce(siege, sockets, () => bytes, BURST);
    },
  },

  parse: {
    about: "the members of 60 rooms send 10 frames each of 185 KB, small objects that take long to parse",
    seconds: 15,
    async run(siege) {
      const objects = Array.from({ length: 14_000 }, (_, i) => `{"k${i}":[]}`).join();
      const bytes = Buffer.concat(Array<Buffer>(10).fill(clientFrame(`{"type":"nonsense","x":[${objects}]}`)));
      const create = { type: "create", clientId: "creator", maxClients: 1 };
      return atOnce(siege, await many(60, () => Member.sit(siege.url, create)), () => bytes, 10);
    },
  },

  pings: {
    about: "300 sockets in no room send 10,000 pings each at once, 25 times their burst",
    seconds: 10,
    async run(siege) {
      const [sockets, each] = [300, 10_000];
      const bytes = Buffer.concat(Array<Buffer>(each).fill(clientFrame("", { opcode: 9 })));
      const raws = await many(sockets, () => RawSocket.open(siege.url, "/", STRANGER));
      let pongs = 0;
      for (const raw of raws) raw.skim(({ length }) => void (pongs += length / 2));
      await siege.begin();
      const began = performance.now();
      for (const raw of raws) raw.write(bytes);
      await siege.until(() => pongs >= sockets * each);
      return nothingElse(`${thousands(pongs)} pongs in ${secondsSince(began)}`);
    },
  },

  metrics: {
    about: "four connections pipeline GET /metrics, with 120 invented origins of 250 backslashes",
    seconds: 10,
    async run(siege) {
      await inventOrigins(siege.url);
      const requests = Array<string>(800).fill(get("/metrics", {}));
      await siege.begin();
      let answers = 0;
      await lanes(siege, 4, () => pipeline(siege.url, requests, () => answers++));
      return nothingElse(`${thousands(answers)} answers`);
    },
  },

  reconnect: {
    about: "one clientId reconnects for each burst: FIN, close frame and reset by turns",
    seconds: RECONNECT_MS / 1000,
    async run(siege) {
      const host = await Member.sit(siege.url, { type: "create", clientId: "host", maxClients: 8 });
      const bytes = Buffer.concat([clientFrame(JSON.stringify(joining(host.room, "again"))), flood(BURST)]);
      let heard = 0;
      host.frames.onText = (payload) => (payload.includes('"message"') ? heard++ : undefined);
      const goodbye = clientFrame(Buffer.from([3, 232]), { opcode: 8 });
      const ways: ((raw: RawSocket) => void)[] = [
        (raw) => raw.end(),
        (raw) => {
          raw.write(goodbye);
          raw.end();
        },
        (raw) => raw.reset(),
      ];
      await siege.begin();
      let times = 0;
      await lanes(siege, 1, async () => {
        const raw = await RawSocket.open(siege.url, "/", STRANGER);
        raw.write(bytes);
        await Promise.race([raw.nextFrame(), raw.closed]);
        ways[times++ % ways.length]?.(raw);
      });
      const atMost = 1.1 * (BURST + 10 + siege.seconds * 200);
      return { text: `${thousands(heard)} frames of ${thousands(times)} bursts in ${siege.seconds} s`, held: heard <= atMost };
    },
  },

  absent: {
    about: "110 rooms of a stranger fill the memory of absent players",
    seconds: 10,
    async run(siege) {
      const { url } = siege;
      const host = async (): Promise<[Client, string]> => {
        const client = await Client.open(url, HONEST);
        return [client, await client.create()];
      };
      /** Joins, and is away before it returns. */
      const visit = async (room: string, clientId: string): Promise<void> => {
        const guest = await Client.open(url, HONEST);
        await guest.join(room, clientId);
        await guest.ask({ type: "leave" });
        await guest.close();
      };
      const [, open] = await host();
      const [strict, kicking] = await host();
      const [closed, locked] = await host();
      for (const room of [open, kicking, locked]) await visit(room, "player");
      strict.send({ type: "kick", index: 1 });
      closed.send({ type: "set_room", locked: true });
      await Promise.all([strict.soFar(), closed.soFar()]);

      const holders = await many(110, () => Member.sit(url, { type: "create", clientId: "holder", maxClients: 1000 }));
      const visitors = await many(600, () => Member.open(url));
      const bytes = visitors.map((_, i) => {
        const { room } = holders[i % holders.length] as Member;
        const pairs = Array.from({ length: BURST / 2 }, (_, n) => [joining(room, `${i} ${n}`), { type: "leave" }]);
        return Buffer.concat(pairs.flat().map((message) => clientFrame(JSON.stringify(message))));
      });
      await siege.begin();
      const began = performance.now();
      visitors.forEach(({ raw }, i) => raw.write(bytes[i] as Buffer));
      await siege.until(() => visitors.every(({ frames, isGone }) => isGone || frames.count >= BURST));
      const took = secondsSince(began);

      const back = async (room: string) => (await Client.open(url, HONEST)).join(room, "player");
      const [returned, barred, own] = [await back(open), await back(kicking), await back(locked)];
      const faults = [
        returned.index === 1 && returned.resumed ? "" : `an absent player got slot ${returned.index}`,
        barred.code === "kicked" ? "" : `a kicked one got ${barred.type}`,
        own.index === 1 && own.resumed ? "" : `a locked room lost its own: ${own.message ?? own.index}`,
      ].filter(Boolean);
      return { text: [`filled in ${took}`, ...faults].join(", "), held: faults.length === 0 };
    },
  },

  searches: {
    about: "on Fly.io, one address keeps its searches busy and guesses codes",
    seconds: 5,
    siblings: true,
    async run(siege) {
      const { url } = siege;
      const planted = await (await Client.open(url, HONEST)).create();
      const statuses = new Map<number, number>();
      await siege.begin();
      await lanes(siege, 24, () => {
        const requests = Array.from({ length: 20 }, () => get(`/room/${guess(planted)}`));
        return pipeline(url, requests, (status) => statuses.set(status, (statuses.get(status) ?? 0) + 1));
      });
      const { status } = await fetch(`${url}/room/${planted}`, { headers: STRANGER, redirect: "manual" });
      const uncounted = (statuses.get(404) ?? 0) + (statuses.get(503) ?? 0);
      const found = status === 200 ? "the planted room found" : `the planted room's look-up is ${status}`;
      return {
        text: `${thousands(uncounted)} guesses in ${siege.seconds} s before ${statuses.get(429) ?? 0} were refused, ${found}`,
        held: status === 429 && uncounted < 1_000,
      };
    },
  },

  subnets: {
    about: "on Fly.io, eight /64s of one /56 keep all searches busy",
    seconds: 5,
    siblings: true,
    async run(siege) {
      const { url } = siege;
      const local = await (await Client.open(url, HONEST)).create();
      const look = async (code: string, address: string): Promise<number> => {
        const headers = { "X-Forwarded-For": address };
        return (await fetch(`${url}/room/${code}`, { headers, redirect: "manual", keepalive: false })).status;
      };
      await siege.begin();
      const filling = lanes(siege, 80, async (lane) => {
        const status = await look(guess(local), `2001:db8:0:${lane % 8}::1`);
        if (status !== 404) await Bun.sleep(5); // who is refused tries again
      });
      let [asked, found] = [0, 0];
      await lanes(siege, 1, async () => {
        await Bun.sleep(100);
        if ((await look(guess(local, "zz"), `198.51.100.${++asked}`)) === 409) found++;
      });
      await filling;
      return { text: `${found} of ${asked} honest look-ups found their room`, held: asked > 10 && found >= asked - 1 };
    },
  },

  "slow-readers": {
    about: "600 members don't read 40 frames of 256 KiB, in 256 MB",
    seconds: 20,
    memory: CONTAINER,
    async run(siege) {
      // Who reads nothing doesn't notice its own end; the sender hears of it, and of nothing else.
      const [sender, ...readers] = (await crowd(siege.url, 601)) as [Member, ...Member[]];
      for (const { raw } of readers) raw.pause();
      const frames = flood(40, LONG);
      await siege.begin();
      sender.raw.write(frames);
      await siege.until(() => sender.isGone || sender.frames.count === readers.length);
      return nothingElse(`${sender.frames.count} of ${readers.length} cut`);
    },
  },

  fragments: {
    about: "2,000 sockets hold an unfinished message of 254 KiB, in 256 MB",
    seconds: 10,
    memory: CONTAINER,
    async run(siege) {
      const sockets = await many(2_000, () => Member.open(siege.url));
      const part = clientFrame(Buffer.alloc(254 * 1024, "x"), { fin: false });
      await siege.begin();
      for (const { raw } of sockets) raw.write(part);
      await siege.until(() => goneOf(sockets) === sockets.length);
      return nothingElse(`${goneOf(sockets)} of ${sockets.length} cut`);
    },
  },

  trickle: {
    about: "400 members of one room answer pings and read a trickle, their buffers nearly full, in 256 MB",
    seconds: 15,
    memory: CONTAINER,
    async run(siege) {
      const frames = Math.floor((await endurance(siege.url)) * NEARLY_FULL);
      const [sender, ...readers] = (await crowd(siege.url, 401)) as [Member, ...Member[]];
      for (const reader of readers) {
        reader.raw.pause();
        reader.breathe();
      }
      await siege.begin();
      sender.raw.write(flood(frames, MEDIUM));
      const timer = setInterval(() => {
        for (const reader of readers) reader.sip();
        sender.raw.write(flood(1, MEDIUM));
      }, 3_000);
      await siege.until(() => sender.isGone || sender.frames.count === readers.length);
      clearInterval(timer);
      return nothingElse(`${frames} frames of 60 kB to each, ${sender.frames.count} of ${readers.length} cut`);
    },
  },

  "many-rooms": {
    about: "150 rooms of four, three of whom don't read, each below every limit, in 256 MB",
    seconds: 15,
    memory: CONTAINER,
    async run(siege) {
      const frames = flood(Math.floor((await endurance(siege.url)) * NEARLY_FULL), MEDIUM);
      const rooms = await many(150, () => crowd(siege.url, 4));
      const silent = rooms.flatMap(([, ...others]) => others);
      for (const member of silent) {
        member.raw.pause();
        member.breathe();
      }
      await siege.begin();
      for (const [sender] of rooms) sender?.raw.write(frames);
      const cut = () => rooms.reduce((sum, [sender]) => sum + (sender?.frames.count ?? 0), 0);
      await siege.until(() => cut() === silent.length);
      return nothingElse(`${cut()} of ${silent.length} cut`);
    },
  },

  http: {
    about: "50 connections ask for /metrics 60 times each and read nothing, in 256 MB",
    seconds: 20,
    memory: CONTAINER,
    async run(siege) {
      await inventOrigins(siege.url);
      const sockets = await many(50, () => RawSocket.connect(siege.url));
      let gone = 0;
      for (const raw of sockets) {
        raw.pause();
        void raw.closed.then(() => gone++);
      }
      const requests = get("/metrics", {}).repeat(60);
      await siege.begin();
      for (const raw of sockets) raw.write(requests);
      await siege.until(() => false);
      for (const raw of sockets) raw.resume();
      await Bun.sleep(NOTICE_MS);
      return nothingElse(`${gone} of ${sockets.length} closed`);
    },
  },
};

async function main([name = "", url = "", seconds = ""]: string[]): Promise<void> {
  const lines = console[Symbol.asyncIterator]();
  let end = Infinity;
  const siege: Siege = {
    url,
    seconds: Number(seconds),
    async begin() {
      console.log("ready");
      await lines.next();
      end = performance.now() + siege.seconds * 1000;
    },
    async until(look) {
      while (!look()) {
        if (performance.now() > end) return false;
        await Bun.sleep(10);
      }
      return true;
    },
  };
  const outcome = await (ATTACKS[name] as Attack).run(siege);
  console.log(JSON.stringify(outcome));
  await lines.next(); // stays until it is ended: its sockets are part of the attack
}

if (import.meta.main) await main(Bun.argv.slice(2));
