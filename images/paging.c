/*
 * Four-level paging: a page table tree of its own with 4 KiB pages at 512 GiB, an alias of a page, page
 * faults that are recovered from by mapping or unprotecting the page, and a remapping. Ends with debug-exit
 * 0, or 1 when one went wrong.
 */
#include "guest.h"

enum { PRESENT = 1, WRITABLE = 2, PAGE_FAULT = 14 };
#define WINDOW 0x8000000000ul /* the second entry of the PML4 */

typedef uint64_t page_t[PAGE_SIZE / 8] __attribute__((aligned(PAGE_SIZE)));

static page_t root, pdpt, pd, pt, page_a, page_b;
static volatile uint64_t fault_count, fault_address, fault_error;
static bool failed;

static void map(unsigned index, const void *page, uint64_t flags) {
    pt[index] = (uintptr_t)page | flags;
    __asm__ volatile("invlpg (%0)" ::"r"(WINDOW + index * PAGE_SIZE) : "memory");
}

/* Makes the faulting access possible: page B, writable. */
__attribute__((interrupt)) static void on_page_fault(struct frame *frame, uint64_t error) {
    (void)frame;
    uint64_t address;
    __asm__ volatile("mov %%cr2, %0" : "=r"(address));
    fault_count++;
    fault_address = address;
    fault_error = error;
    map((address - WINDOW) / PAGE_SIZE % 512, page_b, PRESENT | WRITABLE);
}

static volatile uint64_t *window(unsigned index) { return (volatile uint64_t *)(WINDOW + index * PAGE_SIZE); }

static void check(const char *what, bool good) {
    print("paging: %s %s\n", what, good ? "ok" : "FAILED");
    failed |= !good;
}

static bool faulted(uint64_t count, unsigned index, uint64_t error) {
    print("paging: #PF error 0x%lx at 0x%lx\n", fault_error, fault_address);
    return fault_count == count && fault_address == (uintptr_t)window(index) && fault_error == error;
}

int main(uint32_t magic, uintptr_t info) {
    (void)magic, (void)info;
    serial_init();
    set_gate(PAGE_FAULT, on_page_fault);
    root[0] = pml4[0];
    root[1] = (uintptr_t)pdpt | PRESENT | WRITABLE;
    pdpt[0] = (uintptr_t)pd | PRESENT | WRITABLE;
    pd[0] = (uintptr_t)pt | PRESENT | WRITABLE;
    map(0, page_a, PRESENT | WRITABLE);
    map(2, page_a, PRESENT);
    __asm__ volatile("mov %0, %%cr3" ::"r"(root) : "memory");

    *window(0) = 0x1122334455667788;
    check("alias", *(volatile uint64_t *)page_a == 0x1122334455667788);

    *(volatile uint64_t *)page_b = 0x99;
    uint64_t value = *window(1);
    check("read of a page not present", faulted(1, 1, 0) && value == 0x99);

    *window(3) = 0xaa;
    check("write to a page not present", faulted(2, 3, 2) && *(volatile uint64_t *)page_b == 0xaa);

    *window(2) = 0xbb;
    check("write to a read-only page", faulted(3, 2, 3) && *(volatile uint64_t *)page_b == 0xbb);

    map(0, page_b, PRESENT | WRITABLE);
    check("remapping", *window(0) == 0xbb && *(volatile uint64_t *)page_a == 0x1122334455667788);
    print("paging: %s\n", failed ? "FAILED" : "ok");
    return failed;
}
