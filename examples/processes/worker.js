// a worker takes jobs from somewhere, here from a clock, and ends the one it has when it is asked to stop
let job = 0;
const work = setInterval(() => console.log(`job ${++job} done`), 1000);
console.log('waiting for jobs');
process.on('SIGTERM', () => {
  clearInterval(work);
  console.log('no more jobs');
});
