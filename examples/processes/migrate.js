// run once before each deployment takes over; that the work may be done already is its own to find out
console.log('schema is up to date');
