/** all-cores.sh on a machine with systemd and nginx. */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { ROOT } from "../shared/processes.ts";
import { Systemd, unit, whyNoSystemd } from "./systemd.ts";
import { nginx, read } from "../shared/proxies.ts";

const whyNot = whyNoSystemd ?? (nginx.whyNot || undefined);
const PORTS = [4501, 4502, 4503, 4504];
const PROGRAM = "/opt/party.ts";

/** Debian's nginx.conf, as far as it matters. */
const NGINX_CONF =
  "user root; pid /run/nginx.pid; error_log stderr; events {} http { access_log off; include /etc/nginx/conf.d/*.conf; }";

describe.skipIf(whyNot !== undefined)(`all-cores.sh${whyNot ?? ""}`, () => {
  let systemd: Systemd;
  beforeAll(async () => {
    const files = ["all-cores.sh", "nginx-relays.conf", "nginx-cluster.conf"].map(async (name) => [
      `/opt/deploy/${name}`,
      await read(name),
    ]);
    systemd = await Systemd.open(
      {
        ...Object.fromEntries(await Promise.all(files)),
        "/opt/deploy/party-sockets.service": unit,
        "/etc/nginx/nginx.conf": NGINX_CONF,
        "/etc/nginx/conf.d/.keep": "",
        "/var/lib/nginx/.keep": "",
        "/etc/group": "root:x:0:\n",
        "/opt/client.ts": await Bun.file(join(ROOT, "ops/shared/client.ts")).text(),
      },
      "--network=none", // its ports are fixed
    );
  });
  afterAll(() => systemd[Symbol.asyncDispose]());

  /** Runs a program on the machine. @returns what it gives to `done` */
  async function runs(program: string): Promise<unknown> {
    const begin = 'import { Client } from "/opt/client.ts"; const done = (it) => console.log(JSON.stringify(it));';
    await Bun.write(join(systemd.root, PROGRAM), `${begin}${program};process.exit(0)`);
    return JSON.parse(await systemd.exec("/opt/bun", "run", PROGRAM));
  }

  const pids = () => Promise.all(PORTS.map((port) => systemd.property(`party-sockets@${port}`, "MainPID")));

  test("starts relays and an nginx before them; each can be restarted by itself", async () => {
    await systemd.exec("sh", "/opt/deploy/all-cores.sh", "4");
    const party = await runs(`
      const url = "http://localhost";
      const isUp = (url) => fetch(url + "/health").then(({ ok }) => ok, () => false);
      for (const at of [...[${PORTS}].map((port) => "http://127.0.0.1:" + port), url]) while (!(await isUp(at))) await Bun.sleep(50);
      const hosts = await Promise.all([1, 2, 3, 4].map(() => Client.open(url)));
      const created = await Promise.all(hosts.map((host) => host.ask({ type: "create", clientId: "host", maxClients: 2 })));
      const joined = await Promise.all(
        created.map(async ({ room }) => (await (await Client.open(url + "/" + room)).join(room, "guest")).type),
      );
      done({ instances: created.map(({ instance }) => instance).toSorted(), joined })`);
    expect(party).toEqual({
      instances: ["4501", "4502", "4503", "4504"],
      joined: ["joined", "joined", "joined", "joined"],
    });
    const before = await pids();
    await systemd.systemctl("restart", "party-sockets@4502");
    const after = await pids();
    expect(after.map((pid, i) => pid === before[i])).toEqual([true, false, true, true]);
    const listening = await systemd.exec("ss", "--listening", "--tcp", "--numeric", "--no-header");
    expect(listening.match(/\S+:45\d\d\b/g)?.toSorted()).toEqual(PORTS.map((port) => `127.0.0.1:${port}`));
  });

  test("refuses to start relays that all have the same port", async () => {
    await Bun.write(join(systemd.root, "etc/party-sockets.env"), "MAX_ROOMS=5\nPORT=3000\n");
    await expect(systemd.exec("sh", "/opt/deploy/all-cores.sh")).rejects.toThrow("can't be the same for all relays");
  });
});
