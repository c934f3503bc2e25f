/** The unit, started by a systemd. */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { Client } from "../shared/client.ts";
import { freePort } from "../shared/processes.ts";
import { until } from "../shared/wait.ts";
import { Systemd, unit, whyNoSystemd } from "./systemd.ts";

describe.skipIf(whyNoSystemd !== undefined)(`the unit${whyNoSystemd ?? ""}`, () => {
  let systemd: Systemd;
  const property = (name: string) => systemd.property("party-sockets", name);

  beforeAll(async () => {
    systemd = await Systemd.open({ "/etc/systemd/system/party-sockets.service": unit });
  });
  afterAll(() => systemd[Symbol.asyncDispose]());

  /** Starts the unit with variables of an operator. @returns the relay's URL */
  async function start(variables: Record<string, string> = {}): Promise<string> {
    const port = freePort();
    const lines = Object.entries({ PORT: `${port}`, ...variables }).map(([name, value]) => `${name}=${value}\n`);
    await Bun.write(join(systemd.root, "etc/party-sockets.env"), lines.join(""));
    await systemd.systemctl("restart", "party-sockets");
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
    const status = await systemd.exec("cat", `/proc/${first}/status`);
    expect(status).toMatch(/^CapBnd:\t0+$/m);
    expect(status).toMatch(/^NoNewPrivs:\t1$/m);
    expect(status).toMatch(/^Uid:\t(6\d{4})\t/m); // one of those that DynamicUser takes

    await systemd.systemctl("kill", "--signal=KILL", "party-sockets");
    await until("another relay", async () => !["0", first].includes(await property("MainPID")));
    await until("it to listen", isUp(url));

    const player = await Client.open(url);
    await player.create();
    const stopped = systemd.systemctl("stop", "party-sockets");
    expect(await player.next()).toEqual({ type: "draining", seconds: 2 });
    expect(await player.closed).toEqual({ code: 1012, reason: "restarting" });
    await stopped;
    expect(await property("Result")).toBe("success");
    expect(await property("ExecMainStatus")).toBe("0");
  });

  test("gives up on a relay that refuses its variables each time", async () => {
    await start({ PORT: "x" });
    await until("systemd to give up", async () => (await property("ActiveState")) === "failed", 30_000);
    const log = await systemd.exec("journalctl", "--unit=party-sockets", "--output=cat");
    expect(log).toContain('PORT must be a whole number from 0 to 65535, not "x"');
  });
});
