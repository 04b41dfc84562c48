const http = require('http');

const server = http.createServer((request, response) => response.end('Hello from web\n'));
server.listen(process.env.PORT, () => console.log(`listening on ${process.env.PORT}`));
process.on('SIGTERM', () => server.close(() => process.exit(0)));
