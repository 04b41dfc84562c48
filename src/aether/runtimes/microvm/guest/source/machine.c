/* From a bare kernel to mounted file systems and a network. */
#define _GNU_SOURCE
#include "guest.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <net/route.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static char command_line[4096];

static const unsigned char HOST_MAC[6] = {0x06, 0x00, 0xac, 0x10, 0x00, 0x01};

static void mount_or_die(const char *source, const char *target, const char *type, unsigned long flags,
                         const char *options)
{
    if (mount(source, target, type, flags, options) != 0)
        die("cannot mount %s: %s", target, strerror(errno));
}

void mount_basics(void)
{
    mount_or_die("devtmpfs", "/dev", "devtmpfs", MS_NOSUID | MS_NOEXEC, "mode=0755");
    mount_or_die("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "hidepid=2");
    int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read(fd, command_line, sizeof command_line - 1);
    if (size < 0)
        die("cannot read the kernel's command line");
    close(fd);
}

const char *parameter(const char *name)
{
    static char value[4096];
    char wanted[64];
    int length = snprintf(wanted, sizeof wanted, "aether.%s=", name);
    for (const char *at = command_line; *at; at += strcspn(at, " \n"), at += strspn(at, " \n")) {
        if (strncmp(at, wanted, (size_t)length) != 0)
            continue;
        size_t size = strcspn(at + length, " \n");
        memcpy(value, at + length, size);
        value[size] = 0;
        return value;
    }
    return NULL;
}

/* The modules in /modules, in the order of its list. */
void load_drivers(void)
{
    char list[2048];
    int fd = open("/modules/list", O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read(fd, list, sizeof list - 1);
    if (size < 0)
        die("the initramfs has no list of modules");
    close(fd);
    list[size] = 0;
    for (char *rest = list, *name; (name = strtok_r(rest, "\n", &rest));) {
        char path[256];
        snprintf(path, sizeof path, "/modules/%s", name);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            die("the initramfs has no %s", name);
        if (syscall(SYS_finit_module, fd, "", 0) != 0 && errno != EEXIST)
            die("cannot load %s: %s", name, strerror(errno));
        close(fd);
    }
}

static void set(const char *path, const char *value)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, value, strlen(value)) != (ssize_t)strlen(value))
        say("cannot set %s: %s", path, strerror(errno));
    if (fd >= 0)
        close(fd);
}

/* Without swap, a program that eats all memory first pushes out the pages of its own interpreter and then reads them
 * again and again for minutes. What was used within the last second stays, so the killer comes instead. */
void keep_working_set(void)
{
    mount_or_die("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    set("/sys/kernel/mm/lru_gen/enabled", "y");
    set("/sys/kernel/mm/lru_gen/min_ttl_ms", "1000");
    if (parameter("snapshot"))
        detach_code();
    if (umount2("/sys", MNT_DETACH) != 0)
        die("cannot unmount /sys: %s", strerror(errno));
}

void mount_code(const char *target)
{
    mount_or_die("/dev/vdb", target, "squashfs", MS_RDONLY | MS_NOSUID | MS_NODEV, NULL);
}

/* The runtime's file system becomes /, with the code at /app; both read-only and shared with other machines. */
void enter_root(int with_code)
{
    mount_or_die("/dev/vda", "/system", "squashfs", MS_RDONLY | MS_NOSUID | MS_NODEV, NULL);
    if (with_code)
        mount_code("/system/app");
    mount_or_die("tmpfs", "/system/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=50%");
    mount_or_die("/dev", "/system/dev", NULL, MS_MOVE, NULL);
    mount_or_die("/proc", "/system/proc", NULL, MS_MOVE, NULL);
    if (mkdir("/system/dev/shm", 0755) == 0)
        mount_or_die("tmpfs", "/system/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=1777,size=50%");
    if (chdir("/system") != 0 || mount(".", "/", NULL, MS_MOVE, NULL) != 0 || chroot(".") != 0 || chdir("/") != 0)
        die("cannot enter the root file system: %s", strerror(errno));
}

static struct sockaddr_in internet(const char *address)
{
    struct sockaddr_in found = {.sin_family = AF_INET};
    inet_pton(AF_INET, address, &found.sin_addr);
    return found;
}

static void interface(int fd, const char *name, const char *address, const char *mask)
{
    struct ifreq request = {0};
    struct sockaddr_in value = internet(address);
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
    memcpy(&request.ifr_addr, &value, sizeof value);
    if (ioctl(fd, SIOCSIFADDR, &request) != 0)
        die("cannot set the address of %s: %s", name, strerror(errno));
    value = internet(mask);
    memcpy(&request.ifr_netmask, &value, sizeof value);
    if (ioctl(fd, SIOCSIFNETMASK, &request) != 0)
        die("cannot set the mask of %s: %s", name, strerror(errno));
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    if (ioctl(fd, SIOCSIFFLAGS, &request) != 0)
        die("cannot start %s: %s", name, strerror(errno));
}

/* Asking who has an address costs a turn to the host and back, and on some hosts a second's wait: it is known. */
static void neighbour(int fd, const char *address)
{
    struct arpreq request = {.arp_flags = ATF_PERM | ATF_COM, .arp_dev = "eth0"};
    struct sockaddr_in value = internet(address);
    memcpy(&request.arp_pa, &value, sizeof value);
    request.arp_ha.sa_family = ARPHRD_ETHER;
    memcpy(request.arp_ha.sa_data, HOST_MAC, sizeof HOST_MAC);
    if (ioctl(fd, SIOCSARP, &request) != 0)
        die("cannot name the neighbour %s: %s", address, strerror(errno));
}

static void route(int fd, const char *target, const char *mask, const char *gateway)
{
    struct rtentry entry = {.rt_flags = RTF_UP, .rt_dev = (char *)"eth0"};
    struct sockaddr_in to = internet(target), by = internet(mask), through = internet(gateway ? gateway : "0.0.0.0");
    memcpy(&entry.rt_dst, &to, sizeof to);
    memcpy(&entry.rt_genmask, &by, sizeof by);
    if (gateway) {
        memcpy(&entry.rt_gateway, &through, sizeof through);
        entry.rt_flags |= RTF_GATEWAY;
    }
    if (ioctl(fd, SIOCADDRT, &entry) != 0)
        die("cannot set the route to %s: %s", target, strerror(errno));
}

void start_network(void)
{
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        die("the kernel has no network");
    interface(fd, "lo", "127.0.0.1", "255.0.0.0");
    interface(fd, "eth0", GUEST_ADDRESS, "255.255.255.0");
    route(fd, METADATA_ADDRESS, "255.255.255.255", NULL);
    route(fd, "0.0.0.0", "0.0.0.0", HOST_ADDRESS);
    neighbour(fd, HOST_ADDRESS);
    neighbour(fd, METADATA_ADDRESS);
    close(fd);
    sethostname("function", 8);
}
