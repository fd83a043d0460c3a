// A client of matrix-js-sdk that prints, as lines of JSON, whom it sees in the room's call. Every program here is one.
//
//     node PROGRAM.mjs '{"baseUrl": ..., "userId": ..., "deviceId": ..., "roomId": ...}' < pipe
//
// The access token is in ACCESS_TOKEN. The program ends when its standard input does. With `"sync": "sliding"` it uses
// sliding sync and not /sync. With `"saved": PATH`, /sync goes on from where an earlier client with that file was. With
// `"contents": true` a line also has, as `events`, what those in the room say in their sticky events.

import { existsSync, readFileSync, writeFileSync } from "node:fs";
import {
    ClientEvent, MemoryStore, RoomStateEvent, RoomStickyEventsEvent, SyncAccumulator, SyncState, createClient,
} from "matrix-js-sdk";
import { MatrixRTCSessionEvent } from "matrix-js-sdk/lib/matrixrtc/index.js";
import { SlidingSync } from "matrix-js-sdk/lib/sliding-sync.js";

export const options = JSON.parse(process.argv[2]);
const { baseUrl, userId, deviceId, roomId, sync, saved, contents } = options;

// Node 22 has it. What else the sdk uses here, Node 20 has, too.
Promise.withResolvers ??= () => {
    const made = {};
    made.promise = new Promise((resolve, reject) => Object.assign(made, { resolve, reject }));
    return made;
};

// The sdk's log goes to standard error. Standard output is for the lines alone.
console.log = console.info = console.debug = console.error;

const POLL_MS = 30_000;
const ALL_ROOMS = { ranges: [[0, 99]], timeline_limit: 10, required_state: [["m.room.member", "*"]] };

// Keeps what the sdk's own store for browsers keeps of /sync, in a file.
class FileStore extends MemoryStore {
    #accumulator = new SyncAccumulator();
    #sync = null;

    async startup() {
        if (existsSync(saved)) {
            this.#sync = JSON.parse(readFileSync(saved, "utf8"));
            const { nextBatch, roomsData, accountData } = this.#sync;
            const sync = { next_batch: nextBatch, rooms: roomsData, account_data: { events: accountData } };
            this.#accumulator.accumulate(sync, true);
        }
    }

    async getSavedSync() {
        return this.#sync;
    }

    async getSavedSyncToken() {
        return this.#sync?.nextBatch ?? null;
    }

    async setSyncData(answer) {
        this.#accumulator.accumulate(answer);
        writeFileSync(saved, JSON.stringify(this.#accumulator.getJSON(true)));
    }
}

// What the sdk's own store of sticky events has, which of that it knows from the timeline as well, and the members of
// the call that the sdk makes of it.
function print(room, session) {
    const events = [...room._unstable_getStickyEvents()];
    const sticky = events.map((event) => event.getId());
    const in_timeline = sticky.filter((id) => room.findEventById(id) !== undefined);
    const said = { sticky, in_timeline, call: session.memberships.map((member) => member.userId) };
    if (contents) {
        const joined = events.filter((event) => room.getMember(event.getSender())?.membership === "join");
        said.events = joined.map((event) => ({
            sender: event.getSender(), type: event.getType(), content: event.getContent(),
        }));
    }
    const line = JSON.stringify(said);
    process.stdout.write(`${line}\n`);
    console.error(line); // in the log as well
}

async function watch(client, room) {
    const session = client.matrixRTC.getRoomSession(room);
    room.on(RoomStickyEventsEvent.Update, () => print(room, session));
    session.on(MatrixRTCSessionEvent.MembershipsChanged, () => print(room, session));
    if (contents) {
        room.on(RoomStateEvent.Members, () => print(room, session));
    }
    await session.ensureRecalculateSessionMembers();
    print(room, session);
}

// Gives the client once it is syncing.
export async function start() {
    process.stdin.on("end", () => process.exit(0)).resume();
    const store = saved === undefined ? new MemoryStore() : new FileStore();
    await store.startup();
    const client = createClient({ baseUrl, userId, deviceId, accessToken: process.env.ACCESS_TOKEN, store });
    // Not the room that joinRoom gives: the one that the syncing fills is another object. It is announced once.
    client.on(ClientEvent.Room, (room) => room.roomId === roomId && watch(client, room));
    const syncing = new Promise((resolve) => {
        client.on(ClientEvent.Sync, (state) => state === SyncState.Syncing && resolve());
    });
    const slidingSync =
        sync === "sliding"
            ? new SlidingSync(baseUrl, new Map([["all", ALL_ROOMS]]), ALL_ROOMS, client, POLL_MS)
            : undefined;
    await client.startClient({ disablePresence: true, slidingSync });
    await syncing;
    return client;
}
