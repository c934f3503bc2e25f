/**
 * The floor: the least that any relay of this protocol has to do, as the point of reference for `ops/load/load.ts`.
 *
 *     PORT=0 bun run ops/load/floor.ts
 *
 * It speaks `create`, `join` and `send` (broadcast, or `to` one slot) exactly as the load tool writes them: a message is one
 * fixed splice and one native publish. It checks nothing, limits nothing and trusts everybody: never expose it.
 */
import type { ServerWebSocket } from "bun";

interface Room {
  code: string;
  slots: Map<string, number>; // clientId → index
  sockets: (Socket | undefined)[]; // by index
  connected: number;
}

interface Seat {
  room: Room | undefined;
  index: number;
  head: string; // what a message of this slot begins with
}

type Socket = ServerWebSocket<Seat>;

const SEND = '{"type":"send","data":';
const SEND_TO = '{"type":"send","to":';
const DATA = ',"data":';
const CODE_S = 115; // the "s" at 9 sets `send` apart from `create` and `join`
const CODE_D = 100; // the "d" at 16 sets `data` apart from `to`

const rooms = new Map<string, Room>();

const server = Bun.serve<Seat>({
  port: Number(process.env.PORT ?? 3000),
  fetch(request, server) {
    const data: Seat = { room: undefined, index: -1, head: "" };
    return server.upgrade(request, { data }) ? undefined : new Response("floor\n");
  },
  websocket: {
    idleTimeout: 0,
    maxPayloadLength: 64 * 1024 * 1024,
    backpressureLimit: 1024 * 1024 * 1024,
    message(ws, frame) {
      const text = frame as string;
      const seat = ws.data;
      if (text.charCodeAt(9) !== CODE_S) return sit(ws, JSON.parse(text));
      const room = seat.room as Room;
      if (text.charCodeAt(16) === CODE_D) {
        ws.publishText(room.code, seat.head + text.slice(SEND.length));
      } else {
        const comma = text.indexOf(",", SEND_TO.length);
        const to = Number(text.slice(SEND_TO.length, comma));
        room.sockets[to]?.sendText(seat.head + text.slice(comma + DATA.length));
      }
    },
    close(ws) {
      const { room, index } = ws.data;
      if (!room || room.sockets[index] !== ws) return; // roomless, or replaced
      room.sockets[index] = undefined;
      if (--room.connected === 0) rooms.delete(room.code);
      else server.publish(room.code, `{"type":"peer_left","index":${index}}`);
    },
  },
});

function sit(ws: Socket, message: Record<string, string>): void {
  const clientId = message.clientId as string;
  const created = message.type === "create";
  const room = created ? newRoom() : (rooms.get(message.room ?? "") as Room);
  const index = room.slots.get(clientId) ?? room.slots.size;
  const old = room.sockets[index];
  room.slots.set(clientId, index);
  room.sockets[index] = ws;
  ws.data.room = room;
  ws.data.index = index;
  ws.data.head = `{"type":"message","from":${index},"data":`;
  if (created) {
    ws.sendText(`{"type":"created","room":"${room.code}","instance":"","region":"","index":0}`);
  } else {
    const peers: number[] = [];
    for (const [slot, socket] of room.sockets.entries()) if (socket && slot !== index) peers.push(slot);
    ws.sendText(`{"type":"joined","room":"${room.code}","index":${index},"peers":[${peers}]}`);
  }
  ws.subscribe(room.code);
  if (old) return old.close(4000, "replaced");
  room.connected++;
  ws.publishText(room.code, `{"type":"peer_joined","index":${index}}`);
}

function newRoom(): Room {
  const code = crypto.randomUUID().slice(0, 6);
  if (rooms.has(code)) return newRoom();
  const room = { code, slots: new Map(), sockets: [], connected: 0 };
  rooms.set(code, room);
  return room;
}

// An explicit exit lets `bun --cpu-prof` write its profile.
process.on("SIGTERM", () => process.exit(0));
console.log(`floor listening on ${server.url}`);
