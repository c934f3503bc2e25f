/**
 * The image, built by buildah and run by podman as somebody runs it who gives it no more than it needs. The base image is
 * stood in for by Bun's binary, a shell and the libraries that the two load, under the official name: nothing is downloaded.
 */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { chmod, mkdir, mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { packageManager, version } from "../../package.json" with { type: "json" };
import { LIMITS } from "../../server.ts";
import { Client } from "../shared/testing.ts";

const context = join(import.meta.dir, "../..");
const BASE = `docker.io/oven/${packageManager.replace("@", ":")}-slim`;
const IMAGE = "localhost/party-sockets";
const SOURCE = "https://example.org/party-sockets";
const PATH = `${process.env.PATH}:/usr/sbin:/sbin`; // where Debian keeps runc
const DEADLINE_MS = 60_000;
const LIST = "console.log(require('node:fs').readdirSync('.').toSorted().join(' '))";

/** What a relay needs no more than: half a CPU, 256 MB, no right, no file to write, a user that no image knows. */
const TIGHT = [
  ["--memory=256m", "--cpus=0.5"],
  ["--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges", "--user=4242:4242"],
].flat();
/** What podman would ask for otherwise is more than a nested machine can give. */
const LIMITS_HERE = ["--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096"];

const home = await mkdtemp(join(tmpdir(), "party-sockets-image-"));
afterAll(async () => {
  if (whyNot === undefined) await podman("rm", "--all", "--force", "--time=0");
  await rm(home, { recursive: true, force: true });
});

type Output = { exitCode: number; stdout: string; stderr: string };

/** Runs a command to its end. */
async function run(command: string[], input = ""): Promise<Output> {
  const env = { ...process.env, PATH, TMPDIR: home };
  const child = Bun.spawn(command, { env, stdin: Buffer.from(input), stdout: "pipe", stderr: "pipe", timeout: DEADLINE_MS });
  const [stdout, stderr, exitCode] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
    child.exited,
  ]);
  return { exitCode, stdout, stderr };
}

/** Runs a command that has to succeed. @returns what it printed */
async function must(output: Promise<Output>): Promise<string> {
  const { exitCode, stdout, stderr } = await output;
  if (exitCode !== 0) throw new Error(`exit code ${exitCode}: ${stderr.trim()}`);
  return stdout.trim();
}

// Storage of the test's own, and drivers that work without overlays and systemd.
const storage = [`--root=${join(home, "storage")}`, `--runroot=${join(home, "run")}`, "--storage-driver=vfs"];
const podmanCommand = (args: string[]) => [
  ...["podman", ...storage, `--tmpdir=${join(home, "podman")}`],
  ...["--runtime=runc", "--cgroup-manager=cgroupfs", "--events-backend=none", ...args],
];
const podman = (...args: string[]) => run(podmanCommand(args));

/** Builds an image from a directory. @param args `-f -` takes the Dockerfile from `input` */
function build(name: string, directory: string, args: string[], input = ""): Promise<string> {
  const options = ["--format=docker", "--pull-never", `--tag=${name}`]; // docker's format knows HEALTHCHECK
  return must(run(["buildah", ...storage, "bud", ...options, ...args, directory], input));
}

/** Makes the stand-in of the official base image: its user, its variables, its entry point, and Bun. */
async function buildBase(): Promise<void> {
  const root = join(home, "base");
  const put = async (path: string, content: string | Bun.BunFile) => {
    await mkdir(dirname(join(root, path)), { recursive: true });
    await Bun.write(join(root, path), content);
    await chmod(join(root, path), 0o755);
  };
  const programs: Record<string, string> = { "/usr/local/bin/bun": process.execPath, "/bin/sh": "/bin/sh" };
  for (const [path, from] of Object.entries(programs)) {
    await put(path, Bun.file(from));
    for (const [library] of (await must(run(["ldd", from]))).matchAll(/(?<=^\t|=> )\/\S+/gm))
      if (!(await Bun.file(join(root, library)).exists())) await put(library, Bun.file(library));
  }
  await put("/etc/passwd", "root:x:0:0::/root:/bin/sh\nbun:x:1000:1000::/home/bun:/bin/sh\n");
  await put("/etc/group", "root:x:0:\nbun:x:1000:\n");
  await put("/usr/local/bin/docker-entrypoint.sh", '#!/bin/sh\nset -e\nexec "$@"\n');
  const dockerfile = `
    FROM scratch
    COPY . /
    ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
    ENV BUN_RUNTIME_TRANSPILER_CACHE_PATH=0
    WORKDIR /home/bun/app
    ENTRYPOINT ["/usr/local/bin/docker-entrypoint.sh"]
    CMD ["/usr/local/bin/bun"]`;
  await build(BASE, root, ["--file=-"], dockerfile);
  await rm(root, { recursive: true });
}

/** Why nothing can be built or run on this machine; undefined if it can. Makes the base image on the way. */
async function findWhyNot(): Promise<string | undefined> {
  const missing = ["buildah", "podman", "runc"].filter((name) => Bun.which(name, { PATH }) === null);
  if (missing.length > 0) return `${missing.join(", ")} missing; Debian has packages of these names`;
  if (process.getuid?.() !== 0) return "not root";
  try {
    await buildBase();
    await must(podman("run", "--rm", "--network=host", ...TIGHT, ...LIMITS_HERE, BASE, "bun", "--version"));
  } catch (error) {
    return `no container runs here, ${(error as Error).message.split("\n").at(-1)}`;
  }
}
const whyNot = await findWhyNot();

type Image = {
  Labels: Record<string, string>;
  Config: { User: string; ExposedPorts: object; Env: string[] };
  /** Its times are in nanoseconds. */
  Healthcheck: { Timeout: number };
};
async function inspect(): Promise<Image> {
  const [image] = JSON.parse(await must(podman("image", "inspect", IMAGE))) as [Image];
  return image;
}

function freePort(): number {
  using server = Bun.serve({ port: 0, fetch: () => new Response() });
  return server.port as number;
}

/** Starts a relay in a container, on a free port of this machine. @param env as `-e` has it */
async function start(env: Record<string, string> = {}, args: string[] = []) {
  const port = freePort();
  const name = `relay-${port}`;
  const variables = Object.entries({ PORT: `${port}`, ...env }).map(([key, value]) => `--env=${key}=${value}`);
  const options = ["--rm", `--name=${name}`, "--network=host", ...LIMITS_HERE, ...args, ...variables];
  const child = Bun.spawn(podmanCommand(["run", ...options, IMAGE]), {
    env: { ...process.env, PATH },
    stdout: "pipe",
    stderr: "ignore", // podman misses systemd
  });
  const output = child.stdout.pipeThrough(new TextDecoderStream()).getReader();
  const { value: firstLine = "nothing" } = await output.read();
  if (!firstLine.includes("listening")) throw new Error(`the relay said ${firstLine}`);
  return {
    url: `http://localhost:${port}`,
    /** The relay's exit code. */
    exited: child.exited,
    /** `podman COMMAND NAME`, with options in between. */
    podman: (command: string, ...options: string[]) => podman(command, ...options, name),
    /** Runs the image's HEALTHCHECK once. */
    async isHealthy(): Promise<boolean> {
      const { exitCode, stderr } = await podman("healthcheck", "run", name);
      if (exitCode > 1) throw new Error(stderr); // it didn't run
      return exitCode === 0;
    },
    async [Symbol.asyncDispose]() {
      await podman("rm", "--force", "--time=0", name);
      await child.exited;
    },
  };
}

describe.skipIf(whyNot !== undefined)(`the image${whyNot === undefined ? "" : ` (skipped: ${whyNot})`}`, () => {
  beforeAll(async () => {
    await build(IMAGE, context, [`--build-arg=SOURCE=${SOURCE}`]);
  });

  test("names its version, its source, its user and its port, and holds nothing but what runs", async () => {
    const image = await inspect();
    expect(image.Labels).toMatchObject({
      "org.opencontainers.image.version": version,
      "org.opencontainers.image.source": SOURCE,
    });
    expect(image.Config).toMatchObject({ User: "bun", ExposedPorts: { "3000/tcp": {} } });
    expect(image.Config.Env).toContain("PORT=3000");
    const files = await must(podman("run", "--rm", "--network=host", ...LIMITS_HERE, IMAGE, "bun", "-e", LIST));
    expect(files).toBe("package.json regions.ts server.ts");
  });

  test("runs with the least that an engine gives; `stop` lets a party hear of it, closes it with 1012 and ends with 0", async () => {
    await using relay = await start({}, TIGHT);
    expect(await (await fetch(`${relay.url}/health`)).json()).toEqual({ status: "ok" });
    expect(await relay.isHealthy()).toBe(true);

    const host = await Client.open(relay.url);
    const guest = await Client.open(relay.url);
    const room = await host.create();
    expect(await guest.join(room, "guest")).toEqual({ type: "joined", room, index: 1, peers: [0] });
    expect(await host.next()).toEqual({ type: "peer_joined", index: 1 });
    guest.send({ type: "send", data: { x: 1 }, to: 0 });
    expect(await host.next()).toEqual({ type: "message", from: 1, data: { x: 1 } });
    host.send({ type: "send", data: "go" });
    expect(await guest.next()).toEqual({ type: "message", from: 0, data: "go" });

    const stopped = must(relay.podman("stop", "--time=10")); // docker's default; then both kill
    for (const player of [host, guest]) expect(await player.next()).toEqual({ type: "draining", seconds: LIMITS.drainSeconds });
    guest.send({ type: "send", data: "bye" });
    expect(await host.next()).toEqual({ type: "message", from: 1, data: "bye" });
    for (const player of [host, guest]) expect(await player.closed).toEqual({ code: 1012, reason: "restarting" });
    await stopped;
    expect(await relay.exited).toBe(0);
  });

  test("says what is wrong with a variable and ends with 1", async () => {
    const { exitCode, stderr } = await podman("run", "--rm", "--network=host", ...LIMITS_HERE, "--env=PORT=x", IMAGE);
    expect(stderr).toContain("PORT must be a whole number");
    expect(exitCode).toBe(1);
  });

  test("is healthy while it drains", async () => {
    await using relay = await start({ DRAIN_SECONDS: "3" });
    const player = await Client.open(relay.url);
    await player.create();
    await must(relay.podman("kill", "--signal=TERM")); // podman looks at no container that it is stopping itself
    expect(await player.next()).toEqual({ type: "draining", seconds: 3 });
    expect(await relay.isHealthy()).toBe(true);
    expect(await player.closed).toEqual({ code: 1012, reason: "restarting" });
    expect(await relay.exited).toBe(0);
  });

  test("is healthy through no proxy but by itself", async () => {
    await using relay = await start({ HTTP_PROXY: "http://localhost:1", http_proxy: "http://localhost:1" });
    expect(await relay.isHealthy()).toBe(true);
  });

  test("is unhealthy while it hangs, before the engine gives up, and healthy again after that", async () => {
    await using relay = await start({}, TIGHT);
    await must(relay.podman("kill", "--signal=STOP"));
    const begun = Bun.nanoseconds();
    expect(await relay.isHealthy()).toBe(false);
    expect(Bun.nanoseconds() - begun).toBeLessThan((await inspect()).Healthcheck.Timeout);
    await must(relay.podman("kill", "--signal=CONT"));
    expect(await relay.isHealthy()).toBe(true);
  });
});
