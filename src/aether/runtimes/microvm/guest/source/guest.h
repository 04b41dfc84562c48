/* The first program of a guest, /init: what its parts share.
 *
 * machine.c   from a bare kernel to mounted file systems and a network
 * metadata.c  the environment, fetched once with the boot token (Firecracker's MMDS, version 2)
 * waiting.c   what differs in a guest that a snapshot is made of, and what its clones do first
 * init.c      the order of things, the function as an unprivileged child, and the line to the host
 *
 * Whatever fails ends the machine with one line on the console: no code of a user runs in a half-made guest.
 */
#ifndef AETHER_GUEST_H
#define AETHER_GUEST_H

#include <stddef.h>
#include <stdint.h>

enum { GUEST_UID = 1000, GUEST_GID = 1000, CONTROL_PORT = 81, MAX_WORDS = 1024 };

#define HOST_ADDRESS "172.16.0.1"
#define GUEST_ADDRESS "172.16.0.2"
#define METADATA_ADDRESS "169.254.169.254"

/* What the host wants run; every string lives as long as the machine. */
struct assignment {
    char *argv[MAX_WORDS + 1];
    char *envp[MAX_WORDS + 1];
    char *secret;          /* proves to the host that it speaks with this program, not with the function */
    char *entropy;         /* fresh randomness for the kernel, from the host */
    uint64_t time_ns;      /* the wall clock, nanoseconds since the epoch */
    unsigned port;         /* where the function will listen */
};

/* Say it on the console and stop the machine. */
void die(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* A parameter "aether.NAME=" of the kernel's command line, or NULL. */
const char *parameter(const char *name);

void mount_basics(void);
void load_drivers(void);
void keep_working_set(void);
/* Mounts the root file system and, unless the code is to come later, the code. */
void enter_root(int with_code);
void mount_code(const char *target);
void start_network(void);

/* Dials TCP with a deadline; returns the descriptor or ends the machine. */
int dial(const char *address, unsigned port, int seconds);
void fetch_assignment(const char *token, struct assignment *found);

/* Become the unprivileged process that a function is, and run it. */
void become_function(const struct assignment *work) __attribute__((noreturn));

/* Takes the code's drive from its driver, as another one will be in its place; while /sys is mounted. */
void detach_code(void);
/* Says on the console that a snapshot can be made and returns in a clone, with its boot token. */
const char *wait_for_token(int console);
/* The boot token that the host writes on the console of a clone. */
const char *read_token(int console);
/* Runs `command`, words with commas between, to its end, so that its files are in memory. */
void rehearse(const char *command);
/* Stirs fresh randomness into the kernel's, so that clones have nothing in common. */
void stir(const char *entropy);

#endif
