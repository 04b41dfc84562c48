// A function that answers what it was given, what it can write to and whom it can reach.
const fs = require('fs'), http = require('http'), net = require('net');
function attempt(host, port) {
  return new Promise((done) => {
    const socket = net.connect({host, port});
    const end = (what) => { socket.destroy(); done(what); };
    socket.setTimeout(700, () => end('nothing'));
    socket.on('connect', () => end('connected'));
    socket.on('error', (error) => end(error.code));
  });
}
function ask(method, path, headers) {
  return new Promise((done) => {
    const request = http.request({host: '169.254.169.254', method, path, headers}, (answer) => {
      let body = '';
      answer.on('data', (part) => { body += part; });
      answer.on('end', () => done([answer.statusCode, body]));
    });
    request.on('error', (error) => done([0, error.code]));
    request.end();
  });
}
function write(path) {
  try { fs.writeFileSync(path, 'x'); return 'written'; } catch (error) { return error.code; }
}
const routes = {
  '/who': async () => ({
    env: process.env, uid: process.getuid(), groups: process.getgroups(), cwd: process.cwd(),
    files: fs.readdirSync('.'), version: process.version, now: Date.now(),
    processes: fs.readdirSync('/proc').filter((name) => /^[0-9]+$/.test(name)).length,
    privileges: fs.readFileSync('/proc/self/status', 'utf8').split('\n').filter((line) => /^(Cap...|NoNewPrivs)/.test(line)),
    mounts: fs.readFileSync('/proc/mounts', 'utf8').trim().split('\n').map((line) => line.split(' ')),
    writes: Object.fromEntries(['/app/x', '/x', '/usr/bin/x', '/tmp/x', '/dev/vda', '/dev/mem'].map((path) => [path, write(path)])),
  }),
  '/metadata': async () => {
    // a restored machine was not told its token where its function could read it
    const token = (/aether.token=(\S+)/.exec(fs.readFileSync('/proc/cmdline', 'utf8')) || ['', 'unknown'])[1];
    const session = await ask('PUT', '/latest/api/token', {'X-metadata-token-ttl-seconds': '60', 'Content-Length': '0'});
    return {
      session: session[0],
      again: await ask('GET', '/latest/aether/' + token, {'X-metadata-token': session[1]}),
      bare: await ask('GET', '/latest/aether/' + token, {}),
    };
  },
  '/reach': async () => Object.fromEntries(await Promise.all(
    [['172.16.0.1', 22], ['172.16.0.1', 80], ['172.16.0.3', 3000], ['10.0.0.1', 80], ['192.168.0.1', 80], ['169.254.169.253', 80], [process.env.HOST, Number(process.env.HOST_PORT)]]
      .map(async ([host, port]) => [host + ':' + port, await attempt(host, port)]))),
  '/lie': async () => new Promise((done) => {
    const socket = net.connect({host: '172.16.0.1', port: 81}, () => socket.write('exit 9\n'));
    socket.on('close', () => done({}));
    socket.on('error', (error) => done({error: error.code}));
  }),
  '/eat': async () => { const held = []; for (;;) held.push(Buffer.alloc(1 << 20, 1)); },
  '/flood': () => new Promise((done) => process.stdout.write('flooded ' + 'x'.repeat(70000) + '\n', () => done({}))),
};
http.createServer(async (request, response) => {
  response.end(JSON.stringify(await routes[request.url]()));
}).listen(process.env.PORT, () => console.log('up'));
process.on('SIGTERM', () => {});
