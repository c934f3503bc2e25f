/** The relay against the model: thousands of random steps, other ones in each run. */
import { expect, test } from "bun:test";
import { runModel } from "./model.ts";

/** What a run must have met, so that it can say something: frames by type, refusals by message, closes by code. */
const MET = [
  ...["created", "joined", "peer_joined", "peer_left", "message", "state", "room", "host", "left", "pong", "draining"],
  ...[
    "slot_offer",
    "claimed",
    "forgotten in a room",
    "forgotten in all rooms",
    "4000 replaced",
    "4001 room closed",
    "4002 kicked",
    "1008 too many attempts",
  ],
  ...["Claim not found", "Target peer not found (away)", "Too many attempts", "claim must be a string", "200", "404", "429"],
  ...["Invalid JSON", "Unknown message type", "Already in a room", "Not in a room", "Room not found", "Room is full"],
  ...["Room is locked", "Kicked from room", "Server full", "Target peer not found", "Cannot kick yourself"],
  ...["clientId is required", "clientId is too long", "room is required", "data is required", "State data is required"],
  ...["maxClients must be a positive number", "maxClients must be at most 9", "State too large", "url…"],
  ...["linger must be a whole number from 0 to 300", "hostGrace must be a whole number from 0 to 3600"],
  ...["migrate must be true or false", "migrate needs hostGrace", "locked must be true or false"],
  ...["Only the host can set state", "Only the host can close the room", "Only the host can …"],
  "Only the host can offer another's slot",
];

const newSeed = (): number => Math.floor(Math.random() * 1_000_000);

test("every socket gets the frames and the close that the model expects, in order", async () => {
  const seed = newSeed();
  console.log(`model seed ${seed}`);
  const { seen } = await runModel({ seed, steps: 6000 });
  expect(MET.filter((label) => !seen.has(label))).toEqual([]);
}, 30_000);
