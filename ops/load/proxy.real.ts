/** `bun run load --proxy nginx` with the real nginx: it counts, loses nothing, and tells relays and nginx apart. About 8 s. */
import { describe, expect, test } from "bun:test";
import { join } from "node:path";
import { run } from "../shared/processes.ts";
import { nginx } from "../shared/proxies.ts";
import type { Result } from "./run.ts";

const TOOL = [process.execPath, "run", join(import.meta.dir, "load.ts"), "--proxy", "nginx"];
const SHORT = ["--rooms", "6", "--clients", "4", "--seconds", "0.5", "--warmup", "0", "--runs", "1"];

describe.skipIf(nginx.whyNot !== "")(`what nginx costs${nginx.whyNot}`, () => {
  test("is measured on one relay, one behind nginx, and two that share the rooms behind nginx", async () => {
    const { exitCode, stdout } = await run([...TOOL, ...SHORT, "--senders", "all", "--json"]);
    const results = (JSON.parse(stdout).results as [Result][]).map(([result]) => result);
    for (const result of results) {
      expect(result).toMatchObject({ lost: 0, doubled: 0, outOfOrder: 0, astray: 0, closed: {}, errors: [], ok: true });
      expect(result.sentInAll).toBeGreaterThanOrEqual(24);
      expect(result.deliveredInAll).toBe(3 * result.sentInAll);
      if (process.platform === "linux") expect(result.serverCpuMicros).toBeGreaterThan(0);
    }
    const [direct, behind, cluster] = results as [Result, Result, Result];
    expect(direct.proxyCpuMicros).toBeNull();
    if (process.platform === "linux")
      for (const { proxyCpuMicros } of [behind, cluster]) expect(proxyCpuMicros).toBeGreaterThan(0);
    expect([direct, behind].map(({ roomsOf }) => roomsOf)).toEqual([{ "": 6 }, { "": 6 }]);
    expect(Object.values(cluster.roomsOf)).toEqual([3, 3]);
    expect(exitCode).toBe(0);
  }, 60_000);

  test("is a table with a line for each of them", async () => {
    const { exitCode, stdout } = await run([...TOOL, ...SHORT]);
    for (const name of ["1 relay", "1 relay behind nginx", "2 relays behind nginx"])
      expect(stdout).toMatch(new RegExp(`^${name} +[\\d.]+ +[\\d.]+ +[\\d.]+ .* 0$`, "m"));
    expect(exitCode).toBe(0);
  }, 60_000);
});

test.each([
  [["--proxy", "apache"], "--proxy is one of nginx"],
  [["--proxy", "nginx", "--url", "ws://localhost:1"], "--proxy and --url exclude each other"],
  [["--relays", "2"], "--relays belongs to --proxy"],
])("%p is refused with 2, and why", async (flags, fault) => {
  const { exitCode, stderr } = await run([...TOOL.slice(0, 3), ...flags]);
  expect(stderr).toContain(fault);
  expect(exitCode).toBe(2);
});
