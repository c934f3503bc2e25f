/** The load tools against the floor, and against relays that fail: they find nothing wrong in the one and each fault in the others. */
import { describe, expect, test } from "bun:test";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { mkdir, readdir } from "node:fs/promises";
import { availableParallelism } from "node:os";
import { join } from "node:path";
import type { ServerWebSocket } from "bun";
import { temporaryDirectory } from "../shared/directory.ts";
import { Child, RelayProcess, run } from "../shared/processes.ts";
import { until } from "../shared/wait.ts";
import { carry } from "./compare.ts";
import { CpuGroup, cpuHierarchy, whyNoCpuGroup } from "./cpu-group.ts";
import { plotSvg } from "./plot.ts";
import type { Result } from "./run.ts";
import { dataText, leastBytes, PAYLOADS } from "./wire.ts";

const TOOL = [process.execPath, "run", join(import.meta.dir, "load.ts")];
const FLOOR = `"${process.execPath}" run "${join(import.meta.dir, "floor.ts")}"`;
const SLOW_MS = 30_000; // for tests that measure for a second or two, on a machine that is busy

/** Runs the tool with `--json`; gives its exit code and what it found. */
async function load(...flags: string[]) {
  const warmup = flags.includes("--cold") ? [] : ["--warmup", "0"];
  const { exitCode, stdout, stderr } = await run([...TOOL, "--json", ...warmup, ...flags]);
  return { exitCode, stderr, result: stdout ? JSON.parse(stdout).result : undefined };
}

const GOOD = { lost: 0, doubled: 0, outOfOrder: 0, astray: 0, closed: {}, errors: [] };

describe.concurrent("against the floor", () => {
  test("every broadcast reaches all others of its room once and in order", async () => {
    const { exitCode, result } = await load(
      ...["--server", FLOOR, "--rooms", "3", "--clients", "4", "--senders", "all", "--seconds", "1"],
    );
    expect(result).toMatchObject({ ...GOOD, connect: { members: 12 }, ok: true });
    expect(result.sentInAll).toBeGreaterThanOrEqual(12);
    expect(result.deliveredInAll).toBe(3 * result.sentInAll);
    expect(result.latencyMs.p50).toBeGreaterThan(0);
    expect(result.latencyMs.p50).toBeLessThanOrEqual(result.latencyMs.max);
    expect(exitCode).toBe(0);
  });

  test("targeted messages reach one member each, with frames larger than a read and 64-bit lengths", async () => {
    const { exitCode, result } = await load(
      ...["--server", FLOOR, "--rooms", "2", "--clients", "12", "--senders", "all", "--targeted"],
      ...["--rate", "0", "--bytes", "200000", "--seconds", "0.3"],
    );
    expect(result).toMatchObject({ ...GOOD, ok: true });
    expect(result.sentInAll).toBeGreaterThan(0);
    expect(result.deliveredInAll).toBe(result.sentInAll);
    expect(exitCode).toBe(0);
  });

  test("members that reconnect at once all get their slots back", async () => {
    const { exitCode, result } = await load(...["--server", FLOOR, "--rooms", "5", "--clients", "4", "--flap", "20"]);
    expect(result).toMatchObject({ ...GOOD, flap: { members: 20 }, ok: true });
    expect(exitCode).toBe(0);
  });

  test(
    "the seconds of a series add up to the run",
    async () => {
      const { result } = await load(...["--server", FLOOR, "--rooms", "2", "--cold", "--seconds", "1.5"]);
      const sum = (of: (each: Result["series"][number]) => number) =>
        (result.series as Result["series"]).reduce((all, each) => all + of(each), 0);
      expect(result.series).toHaveLength(2);
      expect(sum(({ deliveries }) => deliveries)).toBe(result.deliveries);
      expect(sum(({ messages }) => messages)).toBe(result.messages);
      expect(Math.max(...result.series.map(({ latencyMs }: Result) => latencyMs.max))).toBe(result.latencyMs.max);
      if (process.platform !== "linux") return; // where the server's CPU can't be read
      expect(sum(({ serverCpuMicros }) => serverCpuMicros as number)).toBeCloseTo(result.serverCpuMicros, 0);
      const [first, last] = result.series;
      expect(result.cold.ratio).toBeCloseTo(first.serverCpuMicrosPerDelivery / last.serverCpuMicrosPerDelivery, 6);
    },
    SLOW_MS,
  );

  test(
    "a series of growing messages gives a plot of each size",
    async () => {
      await using directory = await temporaryDirectory("growth");
      const plot = join(directory.path, "bytes.svg");
      const growth = [process.execPath, "run", join(import.meta.dir, "growth.ts"), "--by", "bytes", "--server", FLOOR];
      const { exitCode, stdout } = await run([
        ...[...growth, "--rooms", "1", "--seconds", "0.1", "--warmup", "0", "--payload", "string", "--plot", plot],
      ]);
      for (const bytes of ["16", "64", "1,024", "65,536"]) expect(stdout).toContain(`payload, bytes ${bytes}, `);
      expect(await Bun.file(plot).text()).toContain("Cost a delivery by payload, bytes");
      expect(exitCode).toBe(0);
    },
    SLOW_MS,
  );
});

type Fault = "none" | "drop" | "double" | "reorder" | "echo" | "close";
type Sent = { from: number; data: string; to: number | undefined };

/** A relay of one room that makes one fault, at the third message to slot 1 (`echo`: from slot 0), and keeps what was sent. */
function faultyRelay(fault: Fault) {
  type Socket = ServerWebSocket<{ index: number }>;
  const sockets: Socket[] = [];
  const sent: Sent[] = [];
  let count = 0;
  let held: string | undefined;
  const deliver = (to: Socket, text: string) => {
    const faulty = to.data.index === 1 && ++count === 3;
    if (faulty && fault === "drop") return;
    if (faulty && fault === "close") return to.close(1008, "so be it");
    if (faulty && fault === "reorder") return void (held = text);
    to.send(text);
    if (faulty && fault === "double") to.send(text);
    if (faulty && fault === "echo") sockets[0]?.send(text);
    if (held && to.data.index === 1) {
      to.send(held);
      held = undefined;
    }
  };
  const server = Bun.serve<{ index: number }>({
    port: 0,
    fetch: (request, server) => (server.upgrade(request, { data: { index: -1 } }) ? undefined : new Response("no")),
    websocket: {
      message(ws, frame) {
        const message = JSON.parse(String(frame));
        if (message.type === "send") {
          const { index } = ws.data;
          const data = JSON.stringify(message.data);
          sent.push({ from: index, data, to: message.to });
          const text = JSON.stringify({ type: "message", from: index, data: message.data });
          for (const socket of sockets)
            if (message.to === undefined ? socket !== ws : socket.data.index === message.to) deliver(socket, text);
          return;
        }
        ws.data.index = sockets.push(ws) - 1;
        const type = message.type === "create" ? "created" : "joined";
        ws.send(JSON.stringify({ type, room: "ABCDEF", index: ws.data.index, peers: [] }));
      },
    },
  });
  return { url: `ws://localhost:${server.port}`, sent, [Symbol.asyncDispose]: () => server.stop(true) };
}

describe("against a relay with one fault, exits with 1 and counts", () => {
  const cases: [Fault, object][] = [
    ["drop", { lost: 1 }],
    ["double", { doubled: 1 }],
    ["reorder", { outOfOrder: 1 }],
    ["echo", { astray: 1 }],
  ];
  test.each(cases)("%s", async (fault, found) => {
    await using relay = faultyRelay(fault);
    const { exitCode, result } = await load(...["--url", relay.url, "--rooms", "1", "--clients", "3", "--seconds", "0.3"]);
    expect(result).toMatchObject({ ...GOOD, ...found, ok: false });
    expect(exitCode).toBe(1);
  });

  test("close, with its code and all that its member misses", async () => {
    await using relay = faultyRelay("close");
    const { exitCode, result } = await load(...["--url", relay.url, "--rooms", "1", "--clients", "3", "--seconds", "0.3"]);
    expect(result).toMatchObject({ closed: { 1008: 1 }, ok: false });
    expect(result.lost).toBeGreaterThan(1);
    expect(result.lost).toBe(2 * result.sentInAll - result.deliveredInAll);
    expect(exitCode).toBe(1);
  });
});

describe.concurrent("sends what games send", () => {
  test("objects of 65 to 90 bytes, of several sizes", async () => {
    await using relay = faultyRelay("none");
    const { result } = await load(...["--url", relay.url, "--rooms", "1", "--senders", "all", "--seconds", "0.2"]);
    const sizes = relay.sent.map(({ data }) => data.length);
    expect(Math.min(...sizes)).toBeGreaterThanOrEqual(65);
    expect(Math.max(...sizes)).toBeLessThanOrEqual(90);
    expect(new Set(sizes).size).toBe(8);
    for (const { data } of relay.sent) expect(JSON.parse(data)).toMatchObject({ x: 12.5, y: -3.25 });
    expect(relay.sent.length).toBe(result.sentInAll);
  });

  test("with --game, a host to all and the others to it, and expects just these deliveries", async () => {
    await using relay = faultyRelay("none");
    const { exitCode, result } = await load(
      ...["--url", relay.url, "--rooms", "1", "--clients", "4", "--game", "30/10", "--seconds", "0.5"],
    );
    const ofHost = relay.sent.filter(({ from }) => from === 0);
    const ofOthers = relay.sent.filter(({ from }) => from !== 0);
    expect(new Set(ofHost.map(({ to }) => to))).toEqual(new Set([undefined]));
    expect(new Set(ofOthers.map(({ to }) => to))).toEqual(new Set([0]));
    expect(new Set(ofOthers.map(({ from }) => from))).toEqual(new Set([1, 2, 3]));
    expect(result).toMatchObject({ ...GOOD, deliveredInAll: 3 * ofHost.length + ofOthers.length, ok: true });
    expect(exitCode).toBe(0);
  });

  test.each([...PAYLOADS])("a payload of the kind %s is JSON of the size that was asked for", (payload) => {
    for (const bytes of [leastBytes(payload), 48, 65, 66, 89, 90, 100, 200, 16384]) {
      const text = dataText(payload, bytes);
      expect(text).toHaveLength(bytes);
      expect(typeof JSON.parse(text)).toBe(payload === "string" ? "string" : "object");
    }
  });
});

const noGroup = process.platform === "linux" ? whyNoCpuGroup() : "no cgroups here";

// One after another: beside a dozen other tests the server doesn't even get what it may use.
describe.skipIf(noGroup !== undefined)(`--cpu${noGroup === undefined ? "" : ` (skipped: ${noGroup})`}`, () => {
  const groups = async () =>
    (await readdir(cpuHierarchy()?.root as string)).filter((name) => name.startsWith("party-sockets-load"));

  test(
    "counts the periods in which the server was stopped, and leaves no group behind",
    async () => {
      const tool = new Child([
        ...TOOL,
        "--server",
        FLOOR,
        "--rooms",
        "2",
        "--rate",
        "0",
        "--cpu",
        "5/50",
        "--seconds",
        "0.5",
        "--json",
      ]);
      expect(await tool.exited).toBe(0);
      const { result } = JSON.parse(tool.lines.slice(tool.lines.indexOf("{"), tool.lines.lastIndexOf("}") + 1).join("\n"));
      expect(result).toMatchObject({ ...GOOD, ok: true });
      expect(result.throttling.throttled).toBeGreaterThan(0);
      expect(result.throttling.throttled).toBeLessThanOrEqual(result.throttling.periods);
      expect(await groups()).not.toContain(`party-sockets-load-${tool.pid}-1`);
    },
    SLOW_MS,
  );

  test(
    "counts none if the server needs less than it may use",
    async () => {
      const { result } = await load(...["--server", FLOOR, "--rooms", "1", "--idle", "--cpu", "70/80", "--seconds", "0.3"]);
      expect(result.throttling.throttled).toBe(0);
    },
    SLOW_MS,
  );

  test(
    "stops it only in the span that was asked for",
    async () => {
      const { result } = await load(
        ...["--server", FLOOR, "--rooms", "2", "--rate", "0", "--cpu", "2/50@1.1-1.7", "--seconds", "2.3"],
      );
      const throttled = result.series.map(({ throttling }: Result) => throttling?.throttled);
      expect(throttled).toEqual([0, expect.any(Number), 0]);
      expect(throttled[1]).toBeGreaterThan(0);
    },
    SLOW_MS,
  );

  /** The functions that Bun's last compiler (FTL) has compiled, as a server reports it that has `REPORT` in its environment. */
  const compiled = (lines: string[]) =>
    lines.flatMap((line) => /^Optimized ([#\w]+)#.* using FTL with FTL/.exec(line)?.[1] ?? []);
  const REPORT = { BUN_JSC_reportFTLCompileTimes: "1" };
  async function saturate(url: string, ...flags: string[]): Promise<void> {
    const { result } = await load("--url", url, "--rooms", "8", "--rate", "0", "--seconds", "4", ...flags);
    expect(result).toMatchObject({ ...GOOD, ok: true });
  }

  test(
    "a relay that finds out keeps Bun's last compiler from what runs for each frame: it would make it stand still",
    async () => {
      await using floor = new Child([process.execPath, "run", join(import.meta.dir, "floor.ts")], {
        env: { PORT: "0", ...REPORT },
      });
      await saturate(`http://127.0.0.1:${await floor.saysPort()}`);
      expect(compiled(floor.lines)).toContain("message"); // that is how it is reported

      await using relay = await RelayProcess.start(REPORT);
      const group = new CpuGroup({ runMicros: 2_000, periodMicros: 80_000 });
      try {
        await Bun.write(group.members, String(relay.pid));
        group.limit();
        await using gentle = new Child([...TOOL, "--url", relay.url, "--rooms", "2", "--rate", "20", "--seconds", "20"]);
        await relay.line(/ cap reached cap=cpu/);
        await gentle.stop("SIGINT");
        group.lift(); // so that much is done, and worth compiling
        for (const flags of [["--senders", "all"], ["--targeted"], ["--bytes", "16384"]]) await saturate(relay.url, ...flags);
        expect(compiled(relay.lines)).toEqual([]);
      } finally {
        await relay.stop("SIGKILL");
        group.remove();
      }
    },
    2 * SLOW_MS,
  );

  test(
    "removes the group and ends the server if the run is cut short",
    async () => {
      await using tool = new Child([...TOOL, "--server", FLOOR, "--rooms", "1", "--cpu", "70/80", "--warmup", "0"]);
      const group = `party-sockets-load-${tool.pid}-1`;
      await tool.line(/running/);
      expect(await groups()).toContain(group);
      expect(await tool.stop("SIGINT")).toBe(2);
      await until("the group to go", async () => !(await groups()).includes(group));
    },
    SLOW_MS,
  );
});

test.skipIf(availableParallelism() < 2 || !Bun.which("taskset") || process.platform !== "linux")(
  "--rival keeps the server's core busy, and goes with the run",
  async () => {
    await using tool = new Child([...TOOL, "--server", FLOOR, "--rooms", "1", "--rival", "all", "--warmup", "0"]);
    const find = (text: string) =>
      until(`${text} to run`, () => childrenOf(tool.pid).find((pid) => commandOf(pid)?.includes(text)));
    const [rival, server] = [await find("while :"), await find("floor.ts")];
    const core = (pid: string) => /^Cpus_allowed_list:\s*(.*)$/m.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1];
    expect(core(rival)).toBe(core(server));
    expect(await tool.stop("SIGINT")).toBe(2);
    await until("both to end", () => commandOf(rival) === undefined && commandOf(server) === undefined);
  },
  SLOW_MS,
);

/** The ids of the processes that a process has started. */
function childrenOf(parent: number): string[] {
  const pids = readdirSync("/proc").filter((name) => /^\d+$/.test(name));
  return pids.filter((pid) => parentOf(pid) === String(parent));
}

const parentOf = (pid: string) => /\) \S (\d+) /.exec(ofProcess(pid, "stat"))?.[1];

/** A process's command line; undefined once it has ended. */
const commandOf = (pid: string) => ofProcess(pid, "cmdline") || undefined;

function ofProcess(pid: string, file: string): string {
  try {
    return readFileSync(`/proc/${pid}/${file}`, "utf8");
  } catch {
    return "";
  }
}

test("a group of cgroup version 2 gets its quota, and loses it", async () => {
  await using directory = await temporaryDirectory("cgroup");
  const root = join(directory.path, "cgroup");
  await mkdir(root);
  await Bun.write(join(root, "cgroup.controllers"), "cpuset cpu io\n");
  await Bun.write(join(root, "cgroup.subtree_control"), "io\n");
  const hierarchy = cpuHierarchy(`proc /proc proc rw 0 0\ncgroup2 ${root} cgroup2 rw,relatime 0 0\n`);
  expect(hierarchy).toEqual({ root, version: 2 });
  const group = new CpuGroup({ runMicros: 5000, periodMicros: 80_000 }, hierarchy);
  const max = () => Bun.file(join(group.path, "cpu.max")).text();
  expect(await Bun.file(join(root, "cgroup.subtree_control")).text()).toBe("+cpu");
  group.limit();
  expect(await max()).toBe("5000 80000");
  group.lift();
  expect(await max()).toBe("max 80000");
  await Bun.write(join(group.path, "cpu.stat"), "usage_usec 9\nnr_periods 503\nnr_throttled 83\nthrottled_usec 1500000\n");
  expect(group.throttling()).toEqual({ periods: 503, throttled: 83, seconds: 1.5 });
  for (const file of ["cpu.max", "cpu.stat"]) await Bun.file(join(group.path, file)).delete(); // in a real one they go with it
  group.remove();
  expect(existsSync(group.path)).toBe(false);
});

describe("how many rooms it carries", () => {
  const result = (rooms: number, ok = true) => [{ latencyMs: { p99: rooms }, ok }] as Result[];

  test("is the most with a p99 below the limit, to a tenth", async () => {
    const { rooms, steps } = await carry(50, [1, 1000], async (rooms) => result(rooms));
    expect(steps.map(({ rooms }) => rooms)).toEqual([1, 2, 4, 8, 16, 32, 64, 64, 48, 56, 56, 52, 52]);
    expect(rooms).toBe(48);
  });

  test("leaves out what lost messages, and what couldn't run", async () => {
    expect((await carry(50, [1, 1000], async (rooms) => result(1, rooms < 5))).rooms).toBe(4);
    expect((await carry(50, [8, 1000], async (rooms) => (rooms < 3 ? result(1) : Promise.reject()))).rooms).toBe(2);
  });

  test("isn't lowered by one run that something else disturbed", async () => {
    let runs = 0;
    expect((await carry(50, [1, 10], async () => result(++runs === 2 ? 99 : 1))).rooms).toBe(8);
  });

  test("ends at the most that can be tried", async () => {
    expect((await carry(50, [1, 20], async () => result(1))).rooms).toBe(16);
  });

  test("is none if one is too much, and the exit code says so", async () => {
    const { exitCode, stdout } = await run([
      ...[...TOOL, "--server", FLOOR, "--carry", "0.001", "--warmup", "0", "--seconds", "0.2"],
    ]);
    expect(stdout).toContain("carries 0 rooms with a p99 below 0.001 ms");
    expect(exitCode).toBe(1);
  });
});

describe.concurrent("exits with 2 and says what is wrong", () => {
  test.each([
    [["--rate", "fast"], "--rate must be a number"],
    [["--roms", "3"], "'--roms'"],
    [["--payload", "xml"], "--payload is one of object, drawing, string"],
    [["--bytes", "10"], "--bytes must be a number, 22 or more"],
    [["--senders", "9"], "--senders must be at most --clients"],
    [["--game", "30"], "--game must be two numbers"],
    [["--game", "30/10", "--rate", "5"], "--game and --rate exclude each other"],
    [["--idle", "--flap", "3"], "--idle and --flap exclude each other"],
    [["--cpu", "5/80@20-10"], "--cpu takes seconds as FROM-TO"],
    [["--cpu", "5/80", "--url", "ws://localhost:1"], "--cpu and --url exclude each other"],
    [["--server", "echo no port"], "ended before its port"],
  ])("%p", async (flags, fault) => {
    const { exitCode, stderr } = await load(...flags);
    expect(stderr).toContain(fault);
    expect(exitCode).toBe(2);
  });
});

test("a plot labels each value and each curve, and escapes what it is given", () => {
  const points: [number, number][] = [
    [10, 1],
    [3000, 20],
  ];
  const svg = plotSvg("Cost", "<machine>", "rooms", "µs", [{ name: "a & b", points }]);
  for (const label of ["Cost", "&#60;machine&#62;", "rooms", "µs", "a &#38; b", ">10<", ">3,000<", ">20<"])
    expect(svg).toContain(label);
  expect(svg).not.toContain("NaN");
});
