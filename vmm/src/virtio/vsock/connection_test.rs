//! The stream's state machine against a reference: a model guest and a model host that count every byte, joined to it by two queues of
//! packets in flight that deliver whenever the test likes.

use std::collections::VecDeque;
use std::time::Instant;

use proptest::prelude::*;

use super::connection::*;
use super::packet::{MAX_PAYLOAD, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// The byte at position `at` of either stream.
fn byte(at: usize) -> u8 {
    (at % 251) as u8
}

/// An honest guest, a host, and the machine under test between them.
struct World {
    now: Instant,
    connection: Connection,
    to_machine: VecDeque<(Segment, Vec<u8>)>,
    to_guest: VecDeque<(Segment, Vec<u8>)>,

    guest_alloc: u32,
    /// Whether the guest tells its credit only when asked; if it had none then, as soon as it has.
    stingy: bool,
    owes_credit: bool,
    guest_sent: usize,
    guest_fin: bool,
    /// Received and not yet read.
    guest_buffer: usize,
    guest_read: usize,
    guest_saw: u32,
    /// The machine's credit as the guest knows it.
    machine_alloc: u32,
    machine_forwarded: usize,

    host_wrote: usize,
    host_fin: bool,
    /// Of `host_wrote`, sent on to the guest.
    host_sent: usize,
    host_read: usize,
}

#[derive(Debug, Clone)]
enum Step {
    GuestWrites(usize),
    GuestReads(usize),
    GuestEnds,
    HostWrites(usize),
    HostReads(usize),
    HostEnds,
    Sends(usize),
    ReachesMachine,
    ReachesGuest,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (1..MAX_PAYLOAD).prop_map(Step::GuestWrites),
        3 => (1..20_000usize).prop_map(Step::GuestReads),
        1 => Just(Step::GuestEnds),
        3 => (1..20_000usize).prop_map(Step::HostWrites),
        3 => (1..MAX_PAYLOAD).prop_map(Step::HostReads),
        1 => Just(Step::HostEnds),
        6 => (1..8_000usize).prop_map(Step::Sends),
        6 => Just(Step::ReachesMachine),
        6 => Just(Step::ReachesGuest),
    ]
}

impl World {
    fn new(by_host: bool, guest_alloc: u32, stingy: bool) -> Self {
        let now = Instant::now();
        let opening = Segment { op: Op::Request, flags: 0, buf_alloc: guest_alloc, fwd_cnt: 0 };
        let mut connection = if by_host { Connection::by_host(now) } else { Connection::by_guest(&opening) };
        let first = connection.next_control(now).unwrap();
        if by_host {
            assert_eq!(first.op, Op::Request);
            let response = Segment { op: Op::Response, ..opening };
            assert_eq!(connection.receive(&response, &[]), Ok(Verdict::Accepted));
        } else {
            assert_eq!(first.op, Op::Response);
        }
        Self {
            now,
            connection,
            to_machine: VecDeque::new(),
            to_guest: VecDeque::new(),
            guest_alloc,
            stingy,
            owes_credit: false,
            guest_sent: 0,
            guest_fin: false,
            guest_buffer: 0,
            guest_read: 0,
            guest_saw: 0,
            machine_alloc: first.buf_alloc,
            machine_forwarded: 0,
            host_wrote: 0,
            host_fin: false,
            host_sent: 0,
            host_read: 0,
        }
    }

    fn say(&mut self, op: Op, flags: u32, payload: Vec<u8>) {
        let segment = Segment { op, flags, buf_alloc: self.guest_alloc, fwd_cnt: self.guest_read as u32 };
        self.to_machine.push_back((segment, payload));
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::GuestWrites(count) if !self.guest_fin => {
                let credit = self.machine_alloc as usize - (self.guest_sent - self.machine_forwarded);
                let count = count.min(credit);
                if count > 0 {
                    let payload = (self.guest_sent..self.guest_sent + count).map(byte).collect();
                    self.guest_sent += count;
                    self.say(Op::Data, 0, payload);
                }
            }
            Step::GuestReads(count) => {
                let count = count.min(self.guest_buffer);
                self.guest_buffer -= count;
                self.guest_read += count;
                if count > 0 && (!self.stingy || std::mem::take(&mut self.owes_credit)) {
                    self.say(Op::CreditUpdate, 0, vec![]);
                }
            }
            Step::GuestEnds if !self.guest_fin => {
                self.guest_fin = true;
                self.say(Op::Shutdown, SHUTDOWN_SEND, vec![]);
            }
            Step::HostWrites(count) if !self.host_fin => self.host_wrote += count,
            Step::HostReads(count) => {
                let held = self.connection.held();
                let count = count.min(held.len());
                for (offset, got) in held.iter().take(count).enumerate() {
                    assert_eq!(*got, byte(self.host_read + offset));
                }
                self.host_read += count;
                self.connection.forward(count);
            }
            Step::HostEnds => self.host_fin = true,
            Step::Sends(room) => self.send(room),
            Step::ReachesMachine => {
                if let Some((segment, payload)) = self.to_machine.pop_front() {
                    let verdict = self.connection.receive(&segment, &payload);
                    assert_eq!(verdict, Ok(Verdict::Open), "{segment:?}");
                }
            }
            Step::ReachesGuest => self.reach_guest(),
            Step::GuestWrites(_) | Step::GuestEnds | Step::HostWrites(_) => {}
        }
    }

    /// What the muxer does when there is a receive descriptor with `room` bytes.
    fn send(&mut self, room: usize) {
        if let Some(segment) = self.connection.next_control(self.now) {
            self.to_guest.push_back((segment, vec![]));
            return;
        }
        let waiting = self.host_wrote - self.host_sent;
        let count = waiting.min(room).min(self.connection.may_send() as usize);
        if count > 0 {
            let payload = (self.host_sent..self.host_sent + count).map(byte).collect();
            self.host_sent += count;
            let segment = self.connection.send(count as u32);
            self.to_guest.push_back((segment, payload));
        } else if waiting > 0 {
            self.connection.starved();
        } else if self.host_fin {
            self.connection.host_sends_no_more();
        }
    }

    fn reach_guest(&mut self) {
        let Some((segment, payload)) = self.to_guest.pop_front() else { return };
        // The stream is far shorter than 2^32, so the counter can only be the count.
        assert!(
            segment.fwd_cnt as usize >= self.machine_forwarded && segment.fwd_cnt as usize <= self.guest_sent
        );
        self.machine_forwarded = segment.fwd_cnt as usize;
        self.machine_alloc = segment.buf_alloc;
        match segment.op {
            Op::Data => {
                assert_eq!(self.guest_saw & SHUTDOWN_SEND, 0, "data after the end");
                for (offset, got) in payload.iter().enumerate() {
                    assert_eq!(*got, byte(self.guest_read + self.guest_buffer + offset));
                }
                self.guest_buffer += payload.len();
                assert!(self.guest_buffer <= self.guest_alloc as usize, "credit exceeded");
            }
            Op::Shutdown => {
                assert_eq!(self.guest_saw & !segment.flags, 0, "a shutdown is never taken back");
                self.guest_saw = segment.flags;
                if segment.flags & SHUTDOWN_SEND != 0 {
                    assert_eq!(self.guest_read + self.guest_buffer, self.host_wrote, "the end came early");
                }
            }
            Op::CreditRequest => {
                self.owes_credit = self.guest_buffer == self.guest_alloc as usize;
                self.say(Op::CreditUpdate, 0, vec![]);
            }
            Op::CreditUpdate => {}
            op => panic!("{op:?} in an open stream"),
        }
    }

    /// Lets everyone do all they can until nothing moves.
    fn settle(&mut self) {
        // A round without progress may still have asked for credit or given it: only several mean rest.
        let mut idle_rounds = 0;
        for _ in 0..10_000 {
            let before = (self.host_read, self.guest_read, self.guest_saw, self.host_sent);
            for step in [
                Step::Sends(4096),
                Step::ReachesGuest,
                Step::GuestReads(usize::MAX),
                Step::ReachesMachine,
                Step::HostReads(usize::MAX),
            ] {
                self.take(&step);
            }
            let after = (self.host_read, self.guest_read, self.guest_saw, self.host_sent);
            let moving = before != after || !self.to_guest.is_empty() || !self.to_machine.is_empty();
            idle_rounds = if moving { 0 } else { idle_rounds + 1 };
            if idle_rounds == 4 {
                return;
            }
        }
        panic!("it never comes to rest");
    }
}

proptest! {
    #[test]
    fn bytes_arrive_in_order_within_credit_and_before_the_end(
        by_host: bool,
        guest_alloc in prop_oneof![1..64u32, 64..100_000u32],
        stingy: bool,
        steps in prop::collection::vec(step(), 0..400),
    ) {
        let mut world = World::new(by_host, guest_alloc, stingy);
        // A guest with a tiny buffer takes a round trip for each of its bytes: keep the stream short enough to settle.
        let longest = guest_alloc as usize * 200;
        for step in &steps {
            let step = match *step {
                Step::HostWrites(count) => Step::HostWrites(count.min(longest - world.host_wrote)),
                ref step => step.clone(),
            };
            world.take(&step);
        }
        world.take(&Step::GuestEnds);
        world.take(&Step::HostEnds);
        world.settle();
        prop_assert_eq!(world.host_read, world.guest_sent);
        prop_assert_eq!(world.guest_read, world.host_wrote);
        prop_assert!(world.connection.delivered_all());
        prop_assert_eq!(world.guest_saw, SHUTDOWN_BOTH);
        prop_assert!(world.connection.deadline().is_some());
    }

    #[test]
    fn a_hostile_guest_cannot_break_it(
        by_host: bool,
        packets in prop::collection::vec(
            (1..8u16, 0..8u32, any::<u32>(), any::<u32>(), 0..40_000usize, 0..40_000usize), 0..200),
    ) {
        let now = Instant::now();
        let opening = Segment { op: Op::Request, flags: 0, buf_alloc: 1000, fwd_cnt: 0 };
        let mut connection = if by_host { Connection::by_host(now) } else { Connection::by_guest(&opening) };
        for (op, flags, buf_alloc, fwd_cnt, len, read) in packets {
            let Some(op) = Op::from_number(op) else { continue };
            let _ = connection.receive(&Segment { op, flags, buf_alloc, fwd_cnt }, &vec![0; len]);
            prop_assert!(connection.held().len() <= BUF_ALLOC as usize);
            connection.forward(read);
            let _ = connection.next_control(now);
            connection.starved();
            let count = connection.may_send().min(read as u32);
            if count > 0 {
                connection.send(count);
            }
        }
    }
}

fn established(buf_alloc: u32) -> Connection {
    let request = Segment { op: Op::Request, flags: 0, buf_alloc, fwd_cnt: 0 };
    let mut connection = Connection::by_guest(&request);
    assert_eq!(connection.next_control(Instant::now()).unwrap().op, Op::Response);
    connection
}

fn data() -> Segment {
    Segment { op: Op::Data, flags: 0, buf_alloc: 1000, fwd_cnt: 0 }
}

#[test]
fn more_than_the_credit_is_a_violation() {
    let mut connection = established(1000);
    assert_eq!(connection.receive(&data(), &[0; BUF_ALLOC as usize]), Ok(Verdict::Open));
    assert_eq!(connection.receive(&data(), &[0]), Err(Violation::CreditExceeded { excess: 1 }));
}

#[test]
fn lies_and_stale_news_about_credit_are_no_news() {
    let mut connection = established(1000);
    connection.send(600);
    assert_eq!(connection.may_send(), 400);
    let update = |fwd_cnt| Segment { op: Op::CreditUpdate, fwd_cnt, ..data() };
    assert_eq!(connection.receive(&update(500), &[]), Ok(Verdict::Open));
    assert_eq!(connection.may_send(), 900);
    for false_news in [400, 601, u32::MAX] {
        assert_eq!(connection.receive(&update(false_news), &[]), Ok(Verdict::Open));
        assert_eq!(connection.may_send(), 900);
    }
}

#[test]
fn a_flood_of_credit_requests_is_one_update() {
    let mut connection = established(1000);
    for _ in 0..1000 {
        let request = Segment { op: Op::CreditRequest, ..data() };
        assert_eq!(connection.receive(&request, &[]), Ok(Verdict::Open));
    }
    assert_eq!(connection.next_control(Instant::now()).unwrap().op, Op::CreditUpdate);
    assert_eq!(connection.next_control(Instant::now()), None);
}

#[test]
fn a_host_that_is_gone_is_told_and_waited_for() {
    let now = Instant::now();
    let mut connection = established(1000);
    assert_eq!(connection.receive(&data(), &[0; 10]), Ok(Verdict::Open));
    connection.host_receives_no_more();
    assert!(connection.held().is_empty());
    let told = connection.next_control(now).unwrap();
    assert_eq!((told.op, told.flags), (Op::Shutdown, SHUTDOWN_RECEIVE));
    // The host's last words are still to be sent.
    assert_eq!(connection.may_send(), 1000);
    connection.send(10);
    // Data on its way when the guest was told goes nowhere, but is no violation.
    assert_eq!(connection.receive(&data(), &[0; 10]), Ok(Verdict::Open));
    assert!(connection.held().is_empty());
    connection.host_sends_no_more();
    let told = connection.next_control(now).unwrap();
    assert_eq!((told.op, told.flags), (Op::Shutdown, SHUTDOWN_BOTH));
    assert_eq!(connection.deadline(), Some(now + CLOSE_TIMEOUT));
}

#[test]
fn data_before_the_answer_is_out_of_turn() {
    let mut connection = Connection::by_host(Instant::now());
    connection.next_control(Instant::now()).unwrap();
    assert_eq!(connection.receive(&data(), &[1]), Err(Violation::OutOfTurn(Op::Data)));
}
