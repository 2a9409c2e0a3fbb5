/*
 * The C floor: the least VMM that boots the test guests, to measure pykvm's costs against.
 *
 *   floor [--mem MIB] [--count] [--json] KERNEL [CMDLINE]   boot KERNEL, console on stdout, figures on stderr
 *   floor [--mem MIB] [--json] --lifecycle N                median cost of create, run to HLT, close
 *
 * One slot, one vCPU, no irqchip. KERNEL: ELF32 (multiboot 1), else flat real mode (CS=0x1000:IP=0).
 * Exit status: 0 HLT, (code << 1) | 1 port 0xf4, 6 the guest crashed, 4 the host cannot run it, 2 usage.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { USAGE = 2, NO_HOST = 4, CRASHED = 6 };
enum { INFO = 0x7000, MMAP = 0x7100, CMDLINE = 0x7200, CMDLINE_MAX = 4095, FLAT_BASE = 0x10000 };
enum { LOW_RAM_END = 0xa0000, HIGH_RAM = 0x100000, MAX_ROUNDS = 100000 };

static int count, json; /* the options */
static size_t ram_size = 512 << 20;

struct vm {
    int kvm, fd, vcpu;
    uint8_t *ram;
    struct kvm_run *run;
    size_t run_size;
    uint64_t exits, loop_ns;
};

static int checked(int result, const char *what) {
    if (result < 0)
        err(NO_HOST, "%s", what);
    return result;
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static struct vm vm_create(int kvm) {
    struct vm vm = {.kvm = kvm, .fd = checked(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM")};
    vm.ram = mmap(NULL, ram_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (vm.ram == MAP_FAILED)
        err(NO_HOST, "%zu bytes of guest memory", ram_size);
    struct kvm_userspace_memory_region slot = {.memory_size = ram_size, .userspace_addr = (uintptr_t)vm.ram};
    checked(ioctl(vm.fd, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
    /* VT-x without unrestricted guest needs three pages for its TSS; elsewhere this costs nothing */
    checked(ioctl(vm.fd, KVM_SET_TSS_ADDR, 0xfffbd000ul), "KVM_SET_TSS_ADDR");
    vm.vcpu = checked(ioctl(vm.fd, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    vm.run_size = (size_t)checked(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    vm.run = mmap(NULL, vm.run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vm.vcpu, 0);
    if (vm.run == MAP_FAILED)
        err(NO_HOST, "mmap of kvm_run");
    return vm;
}

static void vm_close(struct vm *vm) {
    munmap(vm->run, vm->run_size);
    close(vm->vcpu);
    close(vm->fd);
    munmap(vm->ram, ram_size);
}

/* The guest needs the long mode bit of CPUID before it may set EFER.LME. */
static void set_cpuid(struct vm *vm) {
    static struct {
        struct kvm_cpuid2 header;
        struct kvm_cpuid_entry2 entries[256];
    } cpuid = {.header.nent = 256};
    checked(ioctl(vm->kvm, KVM_GET_SUPPORTED_CPUID, &cpuid), "KVM_GET_SUPPORTED_CPUID");
    checked(ioctl(vm->vcpu, KVM_SET_CPUID2, &cpuid), "KVM_SET_CPUID2");
}

/* All segments as `data` with its selector, but CS with another one and code in it. */
static void set_state(struct vm *vm, struct kvm_segment data, uint16_t cs, uint64_t cr0,
                      struct kvm_regs regs) {
    struct kvm_sregs s;
    checked(ioctl(vm->vcpu, KVM_GET_SREGS, &s), "KVM_GET_SREGS");
    s.cs = s.ds = s.es = s.fs = s.gs = s.ss = data;
    s.cs.type = 11;
    s.cs.selector = cs;
    s.cr0 = cr0;
    regs.rflags = 2;
    checked(ioctl(vm->vcpu, KVM_SET_SREGS, &s), "KVM_SET_SREGS");
    checked(ioctl(vm->vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static void start_real_mode(struct vm *vm) {
    struct kvm_segment data = {.base = FLAT_BASE, .limit = 0xffff, .type = 3, .present = 1, .s = 1};
    data.selector = FLAT_BASE >> 4;
    set_state(vm, data, data.selector, 0x10 /* ET */, (struct kvm_regs){.rip = 0});
}

/* Multiboot specification 0.6.96, 3.2 "Machine state" and 3.3 "Boot information format". */
static void start_multiboot(struct vm *vm, uint32_t entry, const char *cmdline) {
    struct kvm_segment data = {
        .limit = ~0u, .selector = 16, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1};
    set_state(vm, data, 8, 0x11 /* ET, PE */,
              (struct kvm_regs){.rip = entry, .rax = 0x2badb002, .rbx = INFO});
    uint32_t high = (uint32_t)ram_size - HIGH_RAM;
    uint32_t map[] = {20, 0, 0, LOW_RAM_END, 0, 1, 20, HIGH_RAM, 0, high, 0, 1};
    uint32_t info[13] = {0x45, LOW_RAM_END / 1024, high / 1024, 0, CMDLINE}; /* 0x45: memory, cmdline, map */
    info[11] = sizeof map;
    info[12] = MMAP;
    memcpy(vm->ram + INFO, info, sizeof info);
    memcpy(vm->ram + MMAP, map, sizeof map);
    strcpy((char *)vm->ram + CMDLINE, cmdline);
}

static uint32_t load_elf32(struct vm *vm, const uint8_t *file, size_t size) {
    const Elf32_Ehdr *header = (const void *)file;
    if (size < sizeof *header || header->e_phoff + (uint64_t)header->e_phnum * sizeof(Elf32_Phdr) > size)
        errx(USAGE, "truncated ELF file");
    const Elf32_Phdr *segment = (const void *)(file + header->e_phoff);
    for (int i = 0; i < header->e_phnum; i++, segment++) {
        if (segment->p_type != PT_LOAD)
            continue;
        uint64_t length = segment->p_filesz;
        if (segment->p_offset + length > size || segment->p_paddr + length > ram_size)
            errx(USAGE, "segment %d does not fit", i);
        memcpy(vm->ram + segment->p_paddr, file + segment->p_offset, length);
    }
    return header->e_entry;
}

static void load(struct vm *vm, const char *path, const char *cmdline) {
    static uint8_t file[16 << 20];
    FILE *stream = fopen(path, "rbe");
    size_t size = stream ? fread(file, 1, sizeof file, stream) : 0;
    if (!size || !feof(stream))
        errx(USAGE, "%s cannot be read, is empty or too large", path);
    fclose(stream);
    if (size > EI_CLASS && !memcmp(file, ELFMAG, SELFMAG) && file[EI_CLASS] == ELFCLASS32) {
        start_multiboot(vm, load_elf32(vm, file, size), cmdline);
        return;
    }
    if (size > LOW_RAM_END - FLAT_BASE)
        errx(USAGE, "%s is too large for a real-mode image", path);
    memcpy(vm->ram + FLAT_BASE, file, size);
    start_real_mode(vm);
}

/* One port exit; returns the exit status when the guest ended itself, else -1. */
static int on_io(struct kvm_run *run) {
    uint8_t *data = (uint8_t *)run + run->io.data_offset;
    size_t length = (size_t)run->io.size * run->io.count;
    if (run->io.direction == KVM_EXIT_IO_IN)
        memset(data, 0xff, length);
    else if (run->io.port == 0xf4)
        return (data[0] << 1 | 1) & 0xff;
    else if (run->io.port == 0x3f8 || run->io.port == 0xe9)
        fwrite(data, 1, length, stdout);
    return -1;
}

static int run_loop(struct vm *vm) {
    struct kvm_run *run = vm->run;
    int status = -1;
    uint64_t start = now_ns();
    while (status < 0) {
        if (ioctl(vm->vcpu, KVM_RUN, 0) < 0) {
            if (errno == EINTR)
                continue;
            err(NO_HOST, "KVM_RUN");
        }
        vm->exits++;
        if (run->exit_reason == KVM_EXIT_IO)
            status = on_io(run);
        else if (run->exit_reason == KVM_EXIT_MMIO)
            memset(run->mmio.data, 0xff, sizeof run->mmio.data);
        else
            status = run->exit_reason == KVM_EXIT_HLT ? 0 : CRASHED;
    }
    vm->loop_ns = now_ns() - start;
    return status;
}

static int by_value(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static int lifecycle(int kvm, size_t rounds) {
    static uint64_t ns[MAX_ROUNDS];
    for (size_t i = 0; i < rounds; i++) {
        uint64_t start = now_ns();
        struct vm vm = vm_create(kvm);
        vm.ram[FLAT_BASE] = 0xf4; /* hlt */
        start_real_mode(&vm);
        if (run_loop(&vm) != 0)
            errx(CRASHED, "the guest did not halt: exit reason %u", vm.run->exit_reason);
        vm_close(&vm);
        ns[i] = now_ns() - start;
    }
    qsort(ns, rounds, sizeof *ns, by_value);
    printf(json ? "{\"rounds\": %zu, \"median_us\": %.1f}\n" : "%zu rounds, median %.1f us\n", rounds,
           (double)ns[rounds / 2] / 1e3);
    return 0;
}

static int run_kernel(int kvm, const char *path, const char *cmdline) {
    struct vm vm = vm_create(kvm);
    set_cpuid(&vm);
    load(&vm, path, cmdline);
    int status = run_loop(&vm);
    if (status == CRASHED)
        warnx("the guest crashed: exit reason %u", vm.run->exit_reason);
    if (json || count)
        fprintf(stderr,
                json ? "{\"exits\": %lu, \"loop_ns\": %lu, \"status\": %d}\n"
                     : "%lu exits in %lu ns, status %d\n",
                vm.exits, vm.loop_ns, status);
    vm_close(&vm);
    return status;
}

int main(int argc, char **argv) {
    static const struct option options[] = {{"mem", 1, NULL, 'm'},
                                            {"lifecycle", 1, NULL, 'l'},
                                            {"count", 0, &count, 1},
                                            {"json", 0, &json, 1},
                                            {0}};
    long rounds = 0, usage = 0;
    for (int option; (option = getopt_long(argc, argv, "+", options, NULL)) != -1;) {
        ram_size = option == 'm' ? (size_t)atol(optarg) << 20 : ram_size;
        rounds = option == 'l' ? atol(optarg) : rounds;
        usage |= option == '?';
    }
    const char *path = argv[optind], *cmdline = path && argv[optind + 1] ? argv[optind + 1] : "";
    usage |= ram_size < 2 << 20 || ram_size > 3ul << 30 || (rounds < 1) == !path || rounds > MAX_ROUNDS ||
             argc > optind + 2;
    if (usage || strlen(cmdline) > CMDLINE_MAX)
        errx(USAGE, "usage: floor [--mem MIB] [--count] [--json] KERNEL [CMDLINE] | --lifecycle N");
    int kvm = checked(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
    return path ? run_kernel(kvm, path, cmdline) : lifecycle(kvm, (size_t)rounds);
}
