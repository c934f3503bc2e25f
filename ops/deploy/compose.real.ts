/** compose.yml, as docker-compose understands it, and run by it on podman, with stand-ins for the images that it would download. */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { Client } from "../shared/client.ts";
import { ROOT, run } from "../shared/processes.ts";
import { until } from "../shared/wait.ts";
import { Engine, whyNoEngine } from "./engine.ts";
import { edit, nginx, read } from "../shared/proxies.ts";

const COMPOSE = "docker-compose";
const whyNoCompose = Bun.which(COMPOSE) === null ? ` (skipped: no ${COMPOSE} on this machine)` : undefined;
const RELAYS = ["11", "12", "13"];
const START_MS = 60_000; // four containers at once, on a busy machine

type Service = { environment?: Record<string, string>; networks: Record<string, { ipv4_address?: string }>; ports?: unknown };

describe.skipIf(whyNoCompose !== undefined)(`compose.yml${whyNoCompose ?? ""}`, () => {
  test("has relays that only nginx and each other reach, where nginx and each other look for them", async () => {
    const { exitCode, stdout, stderr } = await run([COMPOSE, "--file", join(import.meta.dir, "compose.yml"), "config"]);
    expect({ exitCode, stderr }).toEqual({ exitCode: 0, stderr: "" });
    const { services, networks } = Bun.YAML.parse(stdout) as {
      services: Record<string, Service>;
      networks: Record<string, { internal?: boolean }>;
    };
    expect(networks.relays?.internal).toBe(true);
    const sites = await read("compose.relays.conf");
    for (const id of RELAYS) {
      const { environment, networks, ports } = services[`relay-${id}`] as Service;
      expect({ networks, ports }).toEqual({ networks: { relays: { ipv4_address: `10.77.0.${id}` } }, ports: undefined });
      expect(environment).toMatchObject({ INSTANCE_ID: id, PEERS: RELAYS.join(), PEER_ADDRESS: "10.77.0.{id}:3000" });
      expect(sites.split(`server 10.77.0.${id}:3000 `).length - 1).toBe(2);
    }
    expect(Object.keys(services).toSorted()).toEqual(["nginx", ...RELAYS.map((id) => `relay-${id}`)]);
  });
});

const whyNot = whyNoCompose ?? whyNoEngine ?? (nginx.whyNot || undefined);

describe.skipIf(whyNot !== undefined)(`compose.yml run by podman${whyNot ?? ""}`, () => {
  let engine: Engine;
  let url: string;
  let compose: (...command: string[]) => Promise<string>;
  const started = new AsyncDisposableStack();
  const subnet = `10.${100 + (process.pid % 100)}.77`; // somebody else may run the file as it is

  beforeAll(async () => {
    engine = started.use(await Engine.open());
    await engine.buildBun();
    await engine.buildStandIn(
      "docker.io/library/nginx:1.28",
      { "usr/sbin/nginx": Bun.which("nginx", { PATH: `${process.env.PATH}:/usr/sbin` }) as string },
      {
        "etc/passwd": "root:x:0:0::/root:/bin/sh\n",
        "etc/group": "root:x:0:\n",
        "etc/nginx/nginx.conf":
          "user root; pid /run/nginx.pid; error_log stderr notice; events {} http { access_log off; include /etc/nginx/conf.d/*.conf; }",
        "run/.keep": "",
        "var/lib/nginx/.keep": "",
      },
      'STOPSIGNAL SIGQUIT\nCMD ["/usr/sbin/nginx", "-g", "daemon off;"]',
    );
    // Podman publishes a port at an address of either network, and only `outside` can be reached from this machine.
    const unpublished = { '    ports: ["80:80"]\n': "" };
    const texts: [string, string][] = [
      ["compose.yml", edit(await read("compose.yml"), { "../..": ROOT, ...unpublished })],
      ["compose.relays.conf", await read("compose.relays.conf")],
      ["nginx-cluster.conf", await read("nginx-cluster.conf")],
    ];
    const directory = join(engine.home, "compose");
    for (const [name, text] of texts) await Bun.write(join(directory, name), text.replaceAll("10.77.0", subnet));
    const host = await engine.serve();
    const files = ["--project-directory", directory, "--file", join(directory, "compose.yml")];
    compose = (...command) => engine.run("env", `DOCKER_HOST=${host}`, COMPOSE, ...files, ...command);
    started.defer(async () => void (await compose("down", "--timeout=0")));
    await compose("up", "--build", "--detach");
    const [container] = JSON.parse(await engine.podman("inspect", await compose("ps", "--quiet", "nginx")));
    url = `http://${container.NetworkSettings.Networks.compose_outside.IPAddress}`;
    await until("nginx and a relay", async () => (await get("/health"))?.ok, START_MS);
  });
  afterAll(() => started.disposeAsync());

  /** What nginx answers, or undefined if it doesn't. */
  const get = (path: string): Promise<Response | undefined> =>
    fetch(url + path, { redirect: "manual", signal: AbortSignal.timeout(5_000) }).catch(() => undefined);

  /** Waits until a relay is up. */
  const isUp = (id: string) =>
    until(`relay ${id}`, async () => (await get(`/room/1abcde?instance=${id}`))?.headers.get("X-Instance-Id") === id, START_MS);

  /** A host and a guest on one of the relays. */
  async function party(id: string) {
    await isUp(id);
    const host = await Client.open(`${url}/?instance=${id}`);
    const created = await host.ask({ type: "create", clientId: "host", maxClients: 8 });
    expect(created).toMatchObject({ type: "created", instance: id });
    const guest = await Client.open(`${url}/${created.room}`);
    expect(await guest.join(created.room, "guest")).toMatchObject({ type: "joined", peers: [0] });
    await host.next(); // peer_joined
    const goesOn = async () => {
      const data = Math.random();
      guest.send({ type: "send", data });
      expect(await host.next()).toEqual({ type: "message", from: 1, data });
    };
    const end = async () => {
      host.send({ type: "close_room" });
      expect(await guest.closed).toEqual({ code: 4001, reason: "room closed" });
    };
    return { host, guest, goesOn, end };
  }

  test("has parties on each relay, found by nginx and by each other", async () => {
    for (const id of RELAYS) {
      const { goesOn, end } = await party(id);
      await goesOn();
      await end();
    }
  });

  test("stops and starts one relay after another: each lets its party end, and nobody else notices", async () => {
    const drained = await party("11");
    const other = await party("12");
    // `up` does the same, and makes the container anew; docker-compose doesn't recognize podman's networks then.
    const stopped = compose("stop", "relay-11");
    for (const player of [drained.host, drained.guest]) expect(await player.next()).toEqual({ type: "draining", seconds: 300 });
    await drained.goesOn();
    await other.goesOn();
    await drained.end();
    await stopped;
    await other.goesOn();
    await compose("start", "relay-11");
    // Asked itself: podman gives it another hardware address, while nginx remembers the old one for up to a minute.
    await until("it to be back", async () => (await compose("logs", "relay-11")).split(" listening ").length === 1 + 2);
  });
});
