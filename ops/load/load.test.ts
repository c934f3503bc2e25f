/** The load tool against the floor, and against relays that fail: it must find nothing wrong in the one and each fault in the others. */
import { describe, expect, test } from "bun:test";
import { join } from "node:path";
import type { ServerWebSocket } from "bun";
import { plotSvg } from "./plot.ts";

const FLOOR = `"${process.execPath}" run "${join(import.meta.dir, "floor.ts")}"`;

/** Runs the tool with `--json`; gives its exit code and what it found. */
async function load(...flags: string[]) {
  const tool = Bun.spawn([process.execPath, "run", join(import.meta.dir, "load.ts"), "--json", "--warmup", "0", ...flags], {
    stderr: "pipe",
  });
  const [stdout, stderr, exitCode] = await Promise.all([
    new Response(tool.stdout).text(),
    new Response(tool.stderr).text(),
    tool.exited,
  ]);
  return { exitCode, stderr, result: stdout ? JSON.parse(stdout).result : undefined };
}

const GOOD = { lost: 0, doubled: 0, outOfOrder: 0, astray: 0, closed: {}, errors: [] };

describe.concurrent("against the floor", () => {
  test("every broadcast reaches all others of its room once and in order", async () => {
    const { exitCode, result } = await load(
      ...["--server", FLOOR, "--rooms", "3", "--clients", "4", "--senders", "all", "--seconds", "0.3"],
    );
    expect(result).toMatchObject({ ...GOOD, sockets: 12, ok: true });
    expect(result.sentInAll).toBeGreaterThanOrEqual(12);
    expect(result.deliveredInAll).toBe(3 * result.sentInAll);
    expect(result.latencyMs.p50).toBeGreaterThan(0);
    expect(result.latencyMs.p50).toBeLessThanOrEqual(result.latencyMs.max);
    expect(exitCode).toBe(0);
  });

  test("targeted messages reach one member each, with frames larger than a read and 64-bit lengths", async () => {
    const { exitCode, result } = await load(
      ...["--server", FLOOR, "--rooms", "2", "--clients", "12", "--senders", "all", "--targeted"],
      ...["--rate", "0", "--bytes", "200000", "--payload", "object", "--seconds", "0.3"],
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
});

type Fault = "drop" | "double" | "reorder" | "echo" | "close";

/** A relay of one room that makes one fault, at the third message to slot 1 (`echo`: from slot 0). */
function faultyRelay(fault: Fault) {
  type Socket = ServerWebSocket<{ index: number }>;
  const sockets: Socket[] = [];
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
  return Bun.serve<{ index: number }>({
    port: 0,
    fetch: (request, server) => (server.upgrade(request, { data: { index: -1 } }) ? undefined : new Response("no")),
    websocket: {
      message(ws, frame) {
        const message = JSON.parse(String(frame));
        if (message.type === "send") {
          const { index } = ws.data;
          const text = JSON.stringify({ type: "message", from: index, data: message.data });
          for (const socket of sockets) if (socket !== ws) deliver(socket, text);
          return;
        }
        ws.data.index = sockets.push(ws) - 1;
        const type = message.type === "create" ? "created" : "joined";
        ws.send(JSON.stringify({ type, room: "ABCDEF", index: ws.data.index, peers: [] }));
      },
    },
  });
}

describe.concurrent("against a relay with one fault, exits with 1 and counts", () => {
  const cases: [Fault, object][] = [
    ["drop", { lost: 1 }],
    ["double", { doubled: 1 }],
    ["reorder", { outOfOrder: 1 }],
    ["echo", { astray: 1 }],
  ];
  test.each(cases)("%s", async (fault, found) => {
    await using relay = faultyRelay(fault);
    const { exitCode, result } = await load(
      ...["--url", `ws://localhost:${relay.port}`, "--rooms", "1", "--clients", "3", "--seconds", "0.3"],
    );
    expect(result).toMatchObject({ ...GOOD, ...found, ok: false });
    expect(exitCode).toBe(1);
  });

  test("close, with its code and all that its member misses", async () => {
    await using relay = faultyRelay("close");
    const { exitCode, result } = await load(
      ...["--url", `ws://localhost:${relay.port}`, "--rooms", "1", "--clients", "3", "--seconds", "0.3"],
    );
    expect(result).toMatchObject({ closed: { 1008: 1 }, ok: false });
    expect(result.lost).toBeGreaterThan(1);
    expect(result.lost).toBe(2 * result.sentInAll - result.deliveredInAll);
    expect(exitCode).toBe(1);
  });
});

test("exits with 2 and names the flag where one is wrong", async () => {
  const { exitCode, stderr } = await load("--rate", "fast");
  expect(stderr).toContain("--rate must be a number");
  expect(exitCode).toBe(2);
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
