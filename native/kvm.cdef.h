/*
 * What Python may see of <linux/kvm.h>: field names only. Sizes, offsets and every KVM_* number come from the
 * installed header when the module is compiled (build.py adds the constants). "...;" says: there is more, and the
 * compiler knows where. An #ifdef section is kept when the installed header defines that macro.
 */

struct kvm_userspace_memory_region { __u32 slot; __u32 flags; __u64 guest_phys_addr; __u64 memory_size; __u64 userspace_addr; };
#ifdef KVM_SET_USER_MEMORY_REGION2
struct kvm_userspace_memory_region2 { __u32 slot; __u32 flags; __u64 guest_phys_addr; __u64 memory_size; __u64 userspace_addr; __u64 guest_memfd_offset; __u32 guest_memfd; ...; };
#endif
#ifdef KVM_CREATE_GUEST_MEMFD
struct kvm_create_guest_memfd { __u64 size; __u64 flags; ...; };
#endif

/* -- registers ------------------------------------------------------------------------------------------------ */
struct kvm_regs { __u64 rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags; };
struct kvm_segment { __u64 base; __u32 limit; __u16 selector; __u8 type, present, dpl, db, s, l, g, avl, unusable; ...; };
struct kvm_dtable { __u64 base; __u16 limit; ...; };
struct kvm_sregs { struct kvm_segment cs, ds, es, fs, gs, ss, tr, ldt; struct kvm_dtable gdt, idt; __u64 cr0, cr2, cr3, cr4, cr8, efer, apic_base; __u64 interrupt_bitmap[...]; };
struct kvm_sregs2 { struct kvm_segment cs, ds, es, fs, gs, ss, tr, ldt; struct kvm_dtable gdt, idt; __u64 cr0, cr2, cr3, cr4, cr8, efer, apic_base, flags; __u64 pdptrs[4]; };
struct kvm_fpu { __u8 fpr[8][16]; __u16 fcw, fsw; __u8 ftwx; __u16 last_opcode; __u64 last_ip, last_dp; __u8 xmm[16][16]; __u32 mxcsr; ...; };
struct kvm_xsave { __u32 region[...]; ...; };
struct kvm_xcr { __u32 xcr; __u64 value; ...; };
struct kvm_xcrs { __u32 nr_xcrs; __u32 flags; struct kvm_xcr xcrs[...]; ...; };
struct kvm_msr_entry { __u32 index; __u64 data; ...; };
struct kvm_msrs { __u32 nmsrs; struct kvm_msr_entry entries[]; ...; };
struct kvm_msr_list { __u32 nmsrs; __u32 indices[]; };
struct kvm_cpuid_entry2 { __u32 function, index, flags, eax, ebx, ecx, edx; ...; };
struct kvm_cpuid2 { __u32 nent; struct kvm_cpuid_entry2 entries[]; ...; };
struct kvm_lapic_state { char regs[...]; };
struct kvm_mp_state { __u32 mp_state; };
struct kvm_debugregs { __u64 db[4]; __u64 dr6, dr7, flags; ...; };
struct kvm_translation { __u64 linear_address; __u64 physical_address; __u8 valid, writeable, usermode; ...; };
struct kvm_interrupt { __u32 irq; };
struct kvm_guest_debug_arch { __u64 debugreg[8]; };
struct kvm_guest_debug { __u32 control; struct kvm_guest_debug_arch arch; ...; };
struct kvm_debug_exit_arch { __u32 exception, pad; __u64 pc, dr6, dr7; };
struct kvm_signal_mask { __u32 len; __u8 sigset[]; };
struct kvm_nested_state { __u16 flags, format; __u32 size; ...; };
struct kvm_vcpu_events {
    struct { __u8 injected, nr, has_error_code, pending; __u32 error_code; } exception;
    struct { __u8 injected, nr, soft, shadow; } interrupt;
    struct { __u8 injected, pending, masked, pad; } nmi;
    __u32 sipi_vector;
    __u32 flags;
    struct { __u8 smm, pending, smm_inside_nmi, latched_init; } smi;
    __u8 exception_has_payload;
    __u64 exception_payload;
    ...;
};
struct kvm_sync_regs { struct kvm_regs regs; struct kvm_sregs sregs; struct kvm_vcpu_events events; };

/* -- interrupt controllers, timers, routing -------------------------------------------------------------------- */
struct kvm_irqchip { __u32 chip_id, pad; ...; };
struct kvm_ioapic_state { __u64 base_address; __u32 ioregsel, id, irr; ...; };
struct kvm_pit_config { __u32 flags; ...; };
struct kvm_pit_channel_state { __u32 count; __u16 latched_count; __u8 count_latched, status_latched, status, read_state, write_state, write_latch, rw_mode, mode, bcd, gate; __s64 count_load_time; };
struct kvm_pit_state2 { struct kvm_pit_channel_state channels[3]; __u32 flags; ...; };
struct kvm_irq_level { __u32 irq; __u32 level; ...; };
struct kvm_irq_routing_irqchip { __u32 irqchip; __u32 pin; };
struct kvm_irq_routing_msi { __u32 address_lo, address_hi, data, pad; };
struct kvm_irq_routing_entry { __u32 gsi, type, flags; union { struct kvm_irq_routing_irqchip irqchip; struct kvm_irq_routing_msi msi; __u32 pad[8]; } u; ...; };
struct kvm_irq_routing { __u32 nr; __u32 flags; struct kvm_irq_routing_entry entries[]; };
struct kvm_irqfd { __u32 fd, gsi, flags, resamplefd; ...; };
struct kvm_ioeventfd { __u64 datamatch, addr; __u32 len; __s32 fd; __u32 flags; ...; };
struct kvm_msi { __u32 address_lo, address_hi, data, flags, devid; ...; };
struct kvm_clock_data { __u64 clock; __u32 flags; __u64 realtime, host_tsc; ...; };

/* -- memory ---------------------------------------------------------------------------------------------------- */
struct kvm_dirty_log { __u32 slot; void *dirty_bitmap; ...; };
struct kvm_clear_dirty_log { __u32 slot; __u32 num_pages; __u64 first_page; void *dirty_bitmap; ...; };
struct kvm_dirty_gfn { __u32 flags; __u32 slot; __u64 offset; };
struct kvm_coalesced_mmio_zone { __u64 addr; __u32 size; __u32 pio; ...; };
struct kvm_coalesced_mmio { __u64 phys_addr; __u32 len; __u32 pio; __u8 data[8]; ...; };

/* -- the rest -------------------------------------------------------------------------------------------------- */
struct kvm_enable_cap { __u32 cap, flags; __u64 args[4]; ...; };
struct kvm_create_device { __u32 type, fd, flags; };
struct kvm_device_attr { __u32 flags, group; __u64 attr, addr; };
struct kvm_msr_filter_range { __u32 flags, nmsrs, base; __u8 *bitmap; };
struct kvm_msr_filter { __u32 flags; struct kvm_msr_filter_range ranges[...]; };
struct kvm_stats_header { __u32 flags, name_size, num_desc, id_offset, desc_offset, data_offset; };
struct kvm_stats_desc { __u32 flags; __s16 exponent; __u16 size; __u32 offset; __u32 bucket_size; char name[]; ...; };

struct kvm_xen_exit {
    __u32 type;
    union {
        struct { __u32 longmode, cpl; __u64 input, result; __u64 params[6]; } hcall;
    } u;
};
struct kvm_xen_hvm_config { __u32 flags; __u32 msr; ...; };

struct kvm_run {
    __u8 request_interrupt_window;
    __u8 immediate_exit;
    __u32 exit_reason;
    __u8 ready_for_interrupt_injection;
    __u8 if_flag;
    __u16 flags;
    __u64 cr8;
    __u64 apic_base;
    union {
        struct { __u64 hardware_exit_reason; } hw;
        struct { __u64 hardware_entry_failure_reason; __u32 cpu; } fail_entry;
        struct { __u32 exception; __u32 error_code; } ex;
        struct { __u8 direction, size; __u16 port; __u32 count; __u64 data_offset; } io;
        struct { struct kvm_debug_exit_arch arch; } debug;
        struct { __u64 phys_addr; __u8 data[8]; __u32 len; __u8 is_write; } mmio;
        struct { __u64 nr; __u64 args[6]; __u64 ret; __u32 longmode; } hypercall;
        struct { __u64 rip; __u32 is_write; } tpr_access;
        struct { __u32 suberror; __u32 ndata; __u64 data[16]; } internal;
        struct { __u32 type; __u32 ndata; __u64 data[16]; } system_event;
        struct { __u8 vector; } eoi;
        struct { __u8 error; __u8 pad[7]; __u32 reason; __u32 index; __u64 data; } msr;
        struct kvm_xen_exit xen;
#ifdef KVM_EXIT_NOTIFY
        struct { __u32 flags; } notify;
#endif
#ifdef KVM_EXIT_MEMORY_FAULT
        struct { __u64 flags, gpa, size; } memory_fault;
#endif
        char padding[256];
    };
    __u64 kvm_valid_regs;
    __u64 kvm_dirty_regs;
    ...;
};

/* -- the hot loop (runloop.h) ---------------------------------------------------------------------------------- */
struct pk_ring { uint32_t size; uint64_t appended; ...; };
struct pk_action { uint64_t base, len; uint8_t mmio, write, kind; uint8_t enabled; uint64_t value; uint64_t hits; struct pk_ring *ring; uint32_t *word; ...; };
struct pk_table { struct pk_action **actions; uint32_t count; };
struct pk_stat { uint64_t address; uint64_t reads, writes; uint8_t mmio; ...; };
struct pk_vcpu {
    int fd;
    struct kvm_run *run;
    struct pk_table *table;
    uint64_t value;
    uint64_t address;
    uint64_t exits[...];
    uint64_t kicks;
    uint8_t stats_enabled;
    uint64_t guest_ns, outside_ns;
    struct pk_stat *stats;
    uint64_t stats_lost;
    ...;
};

/* -- tracing: exits (trace.h), other processes (<linux/ptrace.h>) ------------------------------------------------ */
struct pk_trace_record {
    uint64_t left_ns, guest_ns, outside_ns, rip, address, value;
    uint32_t lost, elements;
    uint16_t vcpu;
    uint8_t reason, size, flags;
    ...;
};
struct pk_trace { uint64_t written, lost; ...; };
#define PK_TRACE_WRITE ...
#define PK_TRACE_IN_C ...
#define PK_TRACE_LAST ...
#define PK_TRACE_END ...
struct pk_trace *pk_trace_new(uint32_t capacity, uint16_t vcpu, int eventfd);
void pk_trace_free(struct pk_trace *trace);
void pk_trace_use(struct pk_vcpu *vcpu, struct pk_trace *trace, int rip);
int64_t pk_trace_drain(struct pk_trace *trace, int fd);
void pk_trace_finish(struct pk_trace *trace);
static const char pk_kvm_ioctls[]; /* lines of "NAME type of the argument", by build.py from the header */
struct kvm_one_reg { __u64 id, addr; };
struct kvm_vapic_addr { __u64 vapic_addr; };
struct kvm_tpr_access_ctl { __u32 enabled, flags; ...; };
struct kvm_x86_mce { __u64 status, addr, misc, mcg_status; __u8 bank; ...; };
struct kvm_pmu_event_filter { __u32 action, nevents, fixed_counter_bitmap, flags; ...; };
struct ptrace_syscall_info {
    __u8 op;
    union {
        struct { __u64 nr; __u64 args[6]; } entry;
        struct { __s64 rval; __u8 is_error; } exit;
    };
    ...;
};

#define MAP_NORESERVE ... /* Python's mmap module has it from 3.13 on */

#define PK_TO_PYTHON ...
#define PK_APPEND ...
#define PK_CONSTANT ...
#define PK_COUNT ...
#define PK_LOAD ...
#define PK_CLEAR ...
#define PK_KEY_WRITE ...
#define PK_KEY_SIZE_SHIFT ...
#define PK_KEY_STRING ...
#define PK_KEY_PORT_SHIFT ...
#define PK_KEY_COALESCED ...
#define PK_STAT_SLOTS ...
#define PK_EXIT_REASONS ...

int pk_ioctl(int fd, unsigned long request, void *argument);
int pk_ioctl_value(int fd, unsigned long request, unsigned long argument);

int pk_vcpu_init(struct pk_vcpu *vcpu, int fd, size_t run_size, size_t coalesced_offset);
void pk_vcpu_deinit(struct pk_vcpu *vcpu);
int pk_vcpu_enable_stats(struct pk_vcpu *vcpu);
int64_t pk_run(struct pk_vcpu *vcpu);
int64_t pk_settle(struct pk_vcpu *vcpu);
void pk_discard(struct pk_vcpu *vcpu);
void *pk_io_data(struct pk_vcpu *vcpu);
struct kvm_sync_regs *pk_sync_regs(struct pk_vcpu *vcpu);
int pk_coalesced_pop(struct pk_vcpu *vcpu, struct kvm_coalesced_mmio *out);

struct pk_ring *pk_ring_new(uint32_t size, int eventfd);
void pk_ring_free(struct pk_ring *ring);
uint32_t pk_ring_drain(struct pk_ring *ring, void *out, uint32_t size);

void *pk_dynamic_symbol(const char *library, const char *symbol);

int pk_kick_init(int signal_offset);
int pk_kick(struct pk_vcpu *vcpu);
void pk_thread_init(void);

/* -- virtio (virtio.h) ----------------------------------------------------------------------------------------- */
void pk_fence(void);
uint32_t pk_word_or(uint32_t *word, uint32_t bits);
uint32_t pk_word_and(uint32_t *word, uint32_t bits);

/* -- guest memory, queues and the I/O loop in C (guestmem.h, virtqueue.h, ioloop.h) ----------------------------- */
typedef ... pthread_mutex_t;
struct iovec { void *iov_base; size_t iov_len; };
struct pk_slot { uint64_t gpa, size; uint8_t *hva; uint64_t *dirty; uint8_t readonly; };
struct pk_slots { uint32_t count; struct pk_slot *slot; };
struct pk_memory { struct pk_slots *slots; };
struct pk_virtqueue {
    struct pk_memory *memory;
    uint8_t *desc;
    uint16_t *avail, *used;
    uint16_t size;
    uint16_t next_avail, next_used, signalled;
    uint8_t enabled, event_idx, indirect;
};
struct pk_chain { uint16_t head; uint16_t readable, count; uint64_t readable_bytes, writable_bytes; struct iovec iov[...]; };
struct pk_poll { uint32_t max_ns, now_ns; ...; };
struct pk_interrupt { uint32_t *status; int call; };
#define PK_EMPTY ...
#define PK_GOT ...
#define PK_FAULT ...
int pk_queue_pop(struct pk_virtqueue *queue, struct pk_chain *chain);
void pk_queue_unpop(struct pk_virtqueue *queue);
void pk_queue_push(struct pk_virtqueue *queue, uint16_t head, uint32_t written);
int pk_queue_should_interrupt(struct pk_virtqueue *queue);
int pk_queue_want_notification(struct pk_virtqueue *queue);
void pk_memory_written(const struct pk_slots *slots, const void *hva, size_t length);
struct pk_handler { ...; };
struct pk_io;
struct pk_ready { int32_t fd; uint32_t events; };
struct pk_io *pk_io_new(void);
void pk_io_free(struct pk_io *io);
int pk_io_handle(struct pk_io *io, int fd, struct pk_handler *handler);
int pk_io_wait(struct pk_io *io, int epoll, int64_t timeout_ns, struct pk_ready *ready, int max);

/* -- disks (blk.h, <linux/virtio_blk.h>) ----------------------------------------------------------------------- */
struct virtio_blk_geometry { __u16 cylinders; __u8 heads, sectors; };
struct virtio_blk_config {
    __u64 capacity;
    __u32 size_max, seg_max;
    struct virtio_blk_geometry geometry;
    __u32 blk_size;
    __u8 physical_block_exp, alignment_offset;
    __u16 min_io_size;
    __u32 opt_io_size;
    __u8 wce;
    __u16 num_queues;
    __u32 max_discard_sectors, max_discard_seg, discard_sector_alignment;
    __u32 max_write_zeroes_sectors, max_write_zeroes_seg;
    __u8 write_zeroes_may_unmap;
    ...;
};
struct pk_blk {
    struct pk_handler handler;
    pthread_mutex_t *lock;
    int fd;
    uint64_t sectors;
    uint32_t unit;
    uint8_t active, readonly, write_through;
    int flush_error;
    uint64_t reads, writes, flushes;
    struct pk_interrupt interrupt;
    int ended;
    uint8_t parallel, no_nowait;
    uint32_t in_flight;
    uint32_t slow_ns, slow;
    ...;
};
struct pk_blk_failed { struct pk_virtqueue *queue; uint16_t head; uint32_t type; int error; };
#define PK_BLK_SERIAL ...
#define PK_BLK_MISSES ...
#define PK_BLK_ALL ...
struct pk_blk_queue { struct pk_handler handler; struct pk_blk *disk; struct pk_virtqueue *queue; struct pk_poll poll; int kick; };
#define PK_BLK_DONE ...
#define PK_BLK_MORE ...
#define PK_BLK_PYTHON ...
void pk_blk_init(struct pk_blk *disk);
void pk_blk_queue_init(struct pk_blk_queue *queue);
int pk_blk_serve(struct pk_blk_queue *queue);
void pk_blk_complete(struct pk_blk *disk);
void pk_blk_settle(struct pk_blk *disk);
void pk_blk_abandon(struct pk_blk *disk);
void pk_blk_deinit(struct pk_blk *disk);
int pk_blk_take_failed(struct pk_blk *disk, struct pk_blk_failed *failed);
int pk_uring_probe(void);
pthread_mutex_t *pk_mutex_new(void);
void pk_mutex_free(pthread_mutex_t *mutex);
void pk_mutex_lock(pthread_mutex_t *mutex);
void pk_mutex_unlock(pthread_mutex_t *mutex);
int pk_fallocate(int fd, int mode, int64_t offset, int64_t length);

/* -- small devices (<linux/virtio_console.h>, <linux/virtio_balloon.h>, <linux/virtio_vsock.h>) ---------------------- */
struct virtio_fs_config { __u8 tag[...]; __u32 num_request_queues; ...; };
struct virtio_console_config { __u16 cols, rows; __u32 max_nr_ports, emerg_wr; ...; };
struct virtio_console_control { __u32 id; __u16 event, value; };
struct virtio_balloon_config { __u32 num_pages, actual, free_page_hint_cmd_id, poison_val; };
struct virtio_balloon_stat { __u16 tag; __u64 val; ...; };
struct virtio_vsock_hdr {
    __u64 src_cid, dst_cid;
    __u32 src_port, dst_port, len;
    __u16 type, op;
    __u32 flags, buf_alloc, fwd_cnt;
    ...;
};
struct virtio_vsock_event { __u32 id; ...; };
#define VIRTIO_VSOCK_TYPE_STREAM ...
#define VIRTIO_VSOCK_OP_REQUEST ...
#define VIRTIO_VSOCK_OP_RESPONSE ...
#define VIRTIO_VSOCK_OP_RST ...
#define VIRTIO_VSOCK_OP_SHUTDOWN ...
#define VIRTIO_VSOCK_OP_RW ...
#define VIRTIO_VSOCK_OP_CREDIT_UPDATE ...
#define VIRTIO_VSOCK_OP_CREDIT_REQUEST ...
#define VIRTIO_VSOCK_SHUTDOWN_RCV ...
#define VIRTIO_VSOCK_SHUTDOWN_SEND ...
#define VIRTIO_VSOCK_EVENT_TRANSPORT_RESET ...

/* -- networks (net.h, tap.h, <linux/virtio_net.h>) ------------------------------------------------------------- */
struct virtio_net_config {
    __u8 mac[6];
    __u16 status, max_virtqueue_pairs, mtu;
    ...;
};
struct pk_net_handler {
    struct pk_handler handler;
    ...;
};
struct pk_net {
    pthread_mutex_t *lock;
    int fd, epoll;
    uint32_t watched;
    uint8_t active, link, rx_held, tx_held, mergeable, checksums;
    uint64_t features;
    struct pk_virtqueue *rx, *tx;
    struct pk_poll poll;
    struct pk_interrupt interrupt;
    uint64_t rx_frames, rx_bytes, rx_dropped, tx_frames, tx_bytes, tx_dropped;
    uint32_t expected, waiting;
    uint8_t frame[...];
    struct pk_net_handler on_backend, on_rx, on_tx;
    ...;
};
#define PK_NET_DONE ...
#define PK_NET_MORE ...
#define PK_NET_PYTHON ...
struct pk_net *pk_net_new(void);
void pk_net_free(struct pk_net *net);
int pk_net_watch(struct pk_net *net, uint32_t events);
int pk_net_receive(struct pk_net *net);
int pk_net_send(struct pk_net *net);
struct vhost_vring_state { unsigned int index, num; };
struct vhost_vring_file { unsigned int index; int fd; };
struct vhost_vring_addr {
    unsigned int index, flags;
    __u64 desc_user_addr, used_user_addr, avail_user_addr, log_guest_addr;
};
struct vhost_memory_region { __u64 guest_phys_addr, memory_size, userspace_addr, flags_padding; };
struct vhost_memory { __u32 nregions, padding; struct vhost_memory_region regions[]; };
#define PK_IFNAME_SIZE ...
int pk_die_with_parent(void);
int pk_own_mounts(void);
int pk_bind_root(const char *at);
int pk_readonly_mounts(void);

int pk_tap_open(char *name);
int pk_tap_query(int fd, char *name, uint32_t *flags);
int pk_tap_use_header(int fd);
int pk_if_mtu(const char *name);
int pk_if_up(const char *name, int mtu);

/* -- snapshots (snapmem.h) ----------------------------------------------------------------------------------------- */
struct pk_range { uint64_t start, end; };
struct pk_call { unsigned long request; void *argument; };
int pk_map_shared(void *address, size_t length, int fd);
int pk_guard(void *address, size_t length, int eventfd);
void pk_unguard(int number);
int pk_map_private(void *address, size_t length, int fd, uint64_t offset);
int64_t pk_private_ranges(int pagemap, uint64_t start, uint64_t end, struct pk_range *out, size_t room);
int pk_drop(const struct pk_range *ranges, size_t count);
int64_t pk_advise(const struct pk_range *ranges, size_t count, int advice);
int pk_calls(int fd, const struct pk_call *calls, int count);
