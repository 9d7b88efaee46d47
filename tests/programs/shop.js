// Keeps blocks in a function that V8 has compiled: buffers of node are memory of the C library.
'use strict';
const kept = [];

function keepOrder(size) {
  kept.push(Buffer.allocUnsafeSlow(size));
}

function warmUp(n) {
  for (let i = 0; i < n; i++) keepOrder(64);
}

function serveOrders(n) {
  for (let i = 0; i < n; i++) keepOrder(100_003);
}

const lines = require('node:readline').createInterface({ input: process.stdin });
const steps = [
  () => { warmUp(20_000); serveOrders(5); console.log('compiled'); },
  () => {
    // Compiled later: its line in the map of functions comes after the map was read.
    const source = '(function laterOrders(keep, n) { for (let i = 0; i < n; i++) keep(200_003); })';
    require('node:vm').runInThisContext(source, { filename: 'later.js' })(keepOrder, 3);
    console.log('done');
  },
];
lines.on('line', () => (steps.shift() ?? (() => {}))());
console.log('ready');
