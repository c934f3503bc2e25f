/** The unit in a systemd of the test's own: one in a container, with this machine's programs and an `/etc` that knows nothing else. */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { copyFile, mkdir } from "node:fs/promises";
import { join } from "node:path";
import { Client } from "../shared/client.ts";
import { freePort, ROOT } from "../shared/processes.ts";
import { until } from "../shared/wait.ts";
import { Engine, rootOfPrograms, whyNoEngine } from "./engine.ts";

const SYSTEMD = "/usr/lib/systemd/systemd";
const whyNot = whyNoEngine ?? ((await Bun.file(SYSTEMD).exists()) ? undefined : " (skipped: without systemd)");

/** What systemd itself needs: its own mounts, and to look into the processes that it starts. */
const RIGHTS = ["--systemd=always", "--cap-add=sys_admin,sys_ptrace", "--security-opt=seccomp=unconfined"];

describe.skipIf(whyNot !== undefined)(`the unit${whyNot ?? ""}`, () => {
  let engine: Engine;
  let root: string;
  const systemctl = (...command: string[]) => engine.podman("exec", "systemd", "systemctl", ...command);
  const property = (name: string) => systemctl("show", `--property=${name}`, "--value", "party-sockets");

  beforeAll(async () => {
    engine = await Engine.open();
    root = join(engine.home, "root");
    const programs = await rootOfPrograms(root);
    await Bun.write(join(root, "etc/passwd"), "root:x:0:0::/root:/bin/sh\n");
    await Bun.write(join(root, "etc/machine-id"), `${"0123456789abcdef".repeat(2)}\n`); // else it is a first boot, which enables all units
    await copyFile(process.execPath, join(root, "opt/bun"));
    await mkdir(join(root, "opt/party-sockets"));
    for (const name of ["regions.ts", "server.ts"]) await copyFile(join(ROOT, name), join(root, "opt/party-sockets", name));
    const unit = await Bun.file(join(import.meta.dir, "party-sockets.service")).text();
    // `/usr` is this machine's, and stays as it is
    await Bun.write(join(root, "etc/systemd/system/party-sockets.service"), unit.replaceAll("/usr/local/bin/bun", "/opt/bun"));
    engine.start("systemd", ...RIGHTS, ...programs, SYSTEMD, "--unit=basic.target");
    await until("systemd to be up", async () => (await systemctl("is-system-running").catch(() => "")) === "running");
  });
  afterAll(() => engine[Symbol.asyncDispose]());

  /** Starts the unit with variables of an operator. @returns the relay's URL */
  async function start(variables: Record<string, string> = {}): Promise<string> {
    const port = freePort();
    const lines = Object.entries({ PORT: `${port}`, ...variables }).map(([name, value]) => `${name}=${value}\n`);
    await Bun.write(join(root, "etc/party-sockets.env"), lines.join(""));
    await systemctl("restart", "party-sockets");
    return `http://localhost:${port}`;
  }

  const isUp = (url: string) => () =>
    fetch(`${url}/health`).then(
      ({ ok }) => ok,
      () => false,
    );

  test("runs a relay without any right, starts it anew after a crash, and drains it on stop", async () => {
    const url = await start({ DRAIN_SECONDS: "2" });
    await until("the relay to listen", isUp(url));
    const first = await property("MainPID");
    const status = await engine.podman("exec", "systemd", "cat", `/proc/${first}/status`);
    expect(status).toMatch(/^CapBnd:\t0+$/m);
    expect(status).toMatch(/^NoNewPrivs:\t1$/m);
    expect(status).toMatch(/^Uid:\t(6\d{4})\t/m); // one of those that DynamicUser takes

    await systemctl("kill", "--signal=KILL", "party-sockets");
    await until("another relay", async () => !["0", first].includes(await property("MainPID")));
    await until("it to listen", isUp(url));

    const player = await Client.open(url);
    await player.create();
    const stopped = systemctl("stop", "party-sockets");
    expect(await player.next()).toEqual({ type: "draining", seconds: 2 });
    expect(await player.closed).toEqual({ code: 1012, reason: "restarting" });
    await stopped;
    expect(await property("Result")).toBe("success");
    expect(await property("ExecMainStatus")).toBe("0");
  });

  test("gives up on a relay that refuses its variables each time", async () => {
    await start({ PORT: "x" });
    await until("systemd to give up", async () => (await property("ActiveState")) === "failed", 30_000);
    const log = await engine.podman("exec", "systemd", "journalctl", "--unit=party-sockets", "--output=cat");
    expect(log).toContain('PORT must be a whole number from 0 to 65535, not "x"');
  });
});
