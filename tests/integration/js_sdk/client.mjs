// A client of matrix-js-sdk: joins a room and prints, as lines of JSON, whom it sees in the call.
//
//     node client.mjs BASE_URL USER_ID ROOM_ID VIA < pipe
//
// The access token is in ACCESS_TOKEN. It ends when its standard input does.

import { ClientEvent, RoomStickyEventsEvent, SyncState, createClient } from "matrix-js-sdk";
import { MatrixRTCSession } from "matrix-js-sdk/lib/matrixrtc/index.js";

const [baseUrl, userId, roomId, via] = process.argv.slice(2);
const SLOT = { application: "m.call", id: "ROOM" };

// The sdk's log goes to the console; standard output is for the lines alone.
console.log = console.info = console.debug = console.error;

// What the sdk's own store of sticky events holds, which of that it knows from the timeline as well,
// and the call's members that the sdk makes of it.
async function printStore(room) {
    const sticky = [...room._unstable_getStickyEvents()].map((event) => event.getId());
    const in_timeline = sticky.filter((id) => room.findEventById(id) !== undefined);
    const members = await MatrixRTCSession.sessionMembershipsForSlot(room, SLOT);
    const line = JSON.stringify({ sticky, in_timeline, call: members.map((member) => member.userId) });
    process.stdout.write(`${line}\n`);
    console.error(line); // in the log as well
}

process.stdin.on("end", () => process.exit(0)).resume();

const client = createClient({ baseUrl, userId, accessToken: process.env.ACCESS_TOKEN });

// Not the room that joinRoom gives: the one that the syncing fills is another object. It is announced
// once, after its first sticky events; their changes are announced by the room only.
client.on(ClientEvent.Room, (room) => {
    let printed = printStore(room);
    room.on(RoomStickyEventsEvent.Update, () => {
        printed = printed.then(() => printStore(room)); // one after the other
    });
});

const syncing = new Promise((resolve) => {
    client.on(ClientEvent.Sync, (state) => state === SyncState.Syncing && resolve());
});
await client.startClient({ disablePresence: true });
await syncing;
await client.joinRoom(roomId, { viaServers: [via] });
