package resilience

import (
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// share is this instance's share of a key's limit: a bucket in the fallback's store. Times are since the
// fallback's base unless they are in quota.Micros, which are of that store's clock.
//
// Invariant: the bucket decides calls only while serving is set, which is from when it was filled until the
// primary next decides on the key. While serving is not set and a call is in flight, the call fills the
// bucket, or was admitted before the primary's decision; until it ends no other call is admitted. So a bucket
// is filled by one call alone, and never while the use of it is still unknown.
type share struct {
	serving  bool
	inFlight int           // calls that the bucket is deciding, the one that fills it included
	changed  chan struct{} // closed when a waiting call must try again; nil if no call waits

	// The bucket's last decision.
	used int64 // the share's capacity less the tokens that remained
	at   quota.Micros
	seen time.Duration
	// refill is how long the bucket refilled after that decision, until the primary served the key.
	refill time.Duration
}

// mustFill reports whether the next call that is admitted must fill the bucket, and call filled.
func (s *share) mustFill() bool { return !s.serving && s.inFlight == 0 }

// admit counts a call as in flight, which must end with release. If wait is not nil the call is not counted, and may
// try again once wait is closed.
func (s *share) admit() (wait <-chan struct{}) {
	if !s.serving && s.inFlight > 0 {
		if s.changed == nil {
			s.changed = make(chan struct{})
		}
		return s.changed
	}
	s.inFlight++
	return nil
}

// filled says that the bucket was filled, and what is used of it.
func (s *share) filled(used int64, at quota.Micros, now time.Duration) {
	s.serving = true
	s.used, s.at, s.seen = used, at, now
	s.wake()
}

// release ends a call.
func (s *share) release() {
	s.inFlight--
	if s.inFlight == 0 {
		s.wake()
	}
}

// wake lets the waiting calls try again.
func (s *share) wake() {
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
}

// record takes over a decision of the bucket. Decisions that overlap may arrive out of order. The store's
// clock puts them in order, unless it was set back.
func (s *share) record(op quota.Op, d *quota.Decision, now time.Duration) {
	const back = quota.Micros(time.Second / time.Microsecond)
	used := d.Capacity - d.Remaining
	if d.At > s.at || d.At < s.at-back || d.At == s.at && used > s.used || op == quota.OpRefund {
		s.used, s.at, s.seen = used, d.At, now
		if !s.serving {
			s.refill = 0
		}
	}
}

// finished takes over a decision that ended or renewed a hold while the bucket was not serving, and by which so many tokens more
// are used. Of the refill meanwhile it takes no account.
func (s *share) finished(at quota.Micros, used int64, now time.Duration) {
	s.used += used
	s.at, s.seen = max(s.at, at), now
}

// suspend ends the service of the bucket: the primary decides on the key again.
func (s *share) suspend(now time.Duration) {
	if s.serving {
		s.serving, s.refill = false, now-s.seen
	}
}

// usedOf returns how much of a share's limit is used of the suspended bucket, refill until then counted in.
func (s *share) usedOf(l *quota.Limit) int64 { return usedAfter(l, s.used, s.at, s.refill) }
