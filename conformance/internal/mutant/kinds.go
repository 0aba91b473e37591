package mutant

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"net/url"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// comparing compares the charges of a repeat with those of the grant in its own way.
func comparing(same func(a, b []quota.Charge) bool) func(*parts) {
	return func(p *parts) {
		p.recall = func(s *Handle, g grant, cs []quota.Charge, out []quota.Decision) error {
			if p.fault && same(g.charges, cs) && len(cs) <= len(g.decisions) {
				cs = g.charges
				g.decisions = g.decisions[:len(out)]
			}
			return sound().recall(s, g, cs, out)
		}
	}
}

// blind compares the charges of a repeat after a function made the same of some.
func blind(f func(c *quota.Charge)) func(*parts) {
	return comparing(func(a, b []quota.Charge) bool {
		return slices.EqualFunc(a, b, func(a, b quota.Charge) bool { f(&a); f(&b); return driver.SameCharge(a, b) })
	})
}

// naming names the record of an id.
func naming(f func(s *Handle, c *quota.Charge) string) func(*parts) {
	return func(p *parts) {
		p.id = func(s *Handle, c *quota.Charge) string {
			if p.fault {
				return f(s, c)
			}
			return sound().id(s, c)
		}
	}
}

// forgetting keeps the last n grants, or the last n items, of the data.
func forgetting(n int, grants bool) func(*parts) {
	return func(p *parts) {
		p.done = func(s *Handle, cs []quota.Charge) {
			d := s.data
			for i := range cs {
				key := s.key(&cs[i])
				if grants {
					if key = s.id(s, &cs[0]); i > 0 || cs[0].ID == "" {
						continue
					}
				}
				if !slices.Contains(d.order, key) {
					d.order = append(d.order, key)
				}
			}
			for len(d.order) > n {
				if oldest := d.order[0]; p.fault && grants {
					delete(d.grants, oldest)
				} else if p.fault {
					delete(d.items, oldest)
				}
				d.order = d.order[1:]
			}
		}
	}
}

// ids are mutants that take one id, or one call, for another.
func ids() []*Store {
	field := func(name string, f func(c *quota.Charge)) *Store {
		return &Store{Name: "a repeat may differ in " + name, Rule: "C3", Clause: "a request id is granted once", Case: "one field", Says: "want quota.ErrInvalid", alter: blind(f)}
	}
	lists := func(name string, same func(a, b []quota.Charge) bool) *Store {
		return &Store{Name: "a repeat may differ in " + name, Rule: "C3", Clause: "a request id is granted once", Case: "one field", Says: "want quota.ErrInvalid", alter: comparing(same)}
	}
	joined := func(s string) *Store {
		return &Store{Name: fmt.Sprintf("group and id are joined by %q", s), Rule: "C1", Clause: "whatever bytes the key has", Case: "ids that meet", Says: "the id was granted to", alter: naming(func(_ *Handle, c *quota.Charge) string {
			return quota.Group(c.Key) + s + c.ID
		})}
	}
	prefix := func(n int) func(a, b []quota.Charge) bool {
		return func(a, b []quota.Charge) bool {
			return len(a) == len(b) && slices.EqualFunc(a[:min(n, len(a))], b[:min(n, len(b))], driver.SameCharge)
		}
	}
	return []*Store{
		field("the key within the group", func(c *quota.Charge) { c.Key = quota.Group(c.Key) }),
		field("the case of a key", func(c *quota.Charge) { c.Key = strings.ToLower(c.Key) }),
		field("the limit", func(c *quota.Charge) { c.Limit = another }),
		field("the operation", func(c *quota.Charge) { c.Op, c.Within = quota.OpTake, 0 }),
		field("the operation, if neither can be denied", func(c *quota.Charge) {
			if !c.Op.Deniable() {
				c.Op = quota.OpDebit
			}
		}),
		field("the cost", func(c *quota.Charge) { c.Cost = 0 }),
		field("the upper half of the cost", func(c *quota.Charge) { c.Cost = int64(uint32(c.Cost)) }),
		field("the cost of a reset", func(c *quota.Charge) {
			if c.Op == quota.OpReset {
				c.Cost = 0
			}
		}),
		field("the time of the receipt", func(c *quota.Charge) { c.MadeAt = 0 }),
		field("the seconds of the time of the receipt", func(c *quota.Charge) { c.MadeAt -= c.MadeAt % 1_000_000 }),
		field("the accepted delay", func(c *quota.Charge) { c.Within = 0 }),
		field("the digits of cost and time, where they run into one another", func(c *quota.Charge) {
			var n int64
			fmt.Sscan(fmt.Sprint(c.Cost, c.MadeAt%1_000_000)[:min(18, len(fmt.Sprint(c.Cost, c.MadeAt%1_000_000)))], &n)
			c.Cost, c.MadeAt = n, 0
		}),
		lists("the order of the charges", func(a, b []quota.Charge) bool {
			sorted := func(cs []quota.Charge) []quota.Charge {
				cs = slices.Clone(cs)
				slices.SortFunc(cs, func(a, b quota.Charge) int {
					return cmp.Or(cmp.Compare(a.Key, b.Key), cmp.Compare(a.Limit.Name(), b.Limit.Name()))
				})
				return cs
			}
			return slices.EqualFunc(sorted(a), sorted(b), driver.SameCharge)
		}),
		lists("its length, if it is the shorter", func(a, b []quota.Charge) bool {
			return len(b) <= len(a) && slices.EqualFunc(a[:len(b)], b, driver.SameCharge)
		}),
		lists("all charges but the first", prefix(1)),
		lists("the charges behind the eighth", prefix(8)),
		lists("the last of the longest list", prefix(quota.MaxCharges-1)),
		lists("the costs, if their sum is the same", func(a, b []quota.Charge) bool {
			sum := 0
			same := slices.EqualFunc(a, b, func(a, b quota.Charge) bool {
				sum += int(a.Cost - b.Cost)
				a.Cost = b.Cost
				return driver.SameCharge(a, b)
			})
			return same && sum == 0
		}),
		joined(""), joined(":"), joined("\x00"), joined("\t"), joined("~"), joined("::"),
		{Name: "ids are cut to 64 bytes", Rule: "C1", Clause: "whatever bytes the key has", Case: "ids", Says: "the id was granted to", alter: naming(func(_ *Handle, c *quota.Charge) string {
			return quota.Group(c.Key) + "/" + c.ID[:min(64, len(c.ID))]
		})},
		{Name: "ids are alike but for case", Rule: "C1", Clause: "whatever bytes the key has", Case: "ids", Says: "the id was granted to", alter: naming(func(_ *Handle, c *quota.Charge) string {
			return quota.Group(c.Key) + "/" + strings.ToLower(c.ID)
		})},
		{Name: "ids have 16 bits", Rule: "C3", Clause: "a request id is granted once", Case: "thousands", Says: "the id was granted to other charges | an id that is new", alter: naming(func(_ *Handle, c *quota.Charge) string {
			return fmt.Sprint(crc32.ChecksumIEEE([]byte(quota.Group(c.Key)+"/"+c.ID)) >> 16)
		})},
		{Name: "the last thousand ids are remembered", Rule: "C3", Clause: "a request id is granted once", Case: "thousands", Says: "which was granted before, as were", alter: forgetting(1000, true)},
		{Name: "the id of a long list is not remembered", Rule: "C3", Clause: "a request id is granted once", Case: "one field", Says: "the id was granted to", alter: func(p *parts) {
			p.record = func(cs []quota.Charge, out []quota.Decision) (grant, bool) {
				g, keep := sound().record(cs, out)
				return g, keep && !(p.fault && len(cs) > 32)
			}
		}},
		{Name: "an id is forgotten when the handle closes that was granted it", Rule: "C3", Clause: "a request id is granted once", Case: "handles", Says: "when another one was closed", alter: func(p *parts) {
			var mine []string
			p.done = func(s *Handle, cs []quota.Charge) {
				if cs[0].ID != "" {
					mine = append(mine, s.id(s, &cs[0]))
				}
			}
			p.close = func(s *Handle) error {
				s.gate.Close()
				s.data.mu.Lock()
				defer s.data.mu.Unlock()
				for _, id := range mine {
					if s.fault {
						delete(s.data.grants, id)
					}
				}
				return nil
			}
		}},
		{Name: "a handle that is opened later does not know the ids of before", Rule: "C3", Clause: "a request id is granted once", Case: "handles", Says: "by a handle that was opened later", alter: func(p *parts) {
			p.id = func(s *Handle, c *quota.Charge) string {
				id := sound().id(s, c)
				if p.fault {
					id += fmt.Sprint((s.serial - 1) / 2)
				}
				return id
			}
		}},
		{Name: "a repeat does not tell the delay", Rule: "C3", Clause: "repeated faithfully", Case: "one field", Says: "differing in Delay", alter: func(p *parts) {
			p.recall = func(s *Handle, g grant, cs []quota.Charge, out []quota.Decision) error {
				err := sound().recall(s, g, cs, out)
				for i := range out {
					if p.fault {
						out[i].Delay = 0
					}
				}
				return err
			}
		}},
	}
}

var another = quota.NewLimit("another", bucket(1))

// handles are mutants in which two handles on the same data disagree.
func handles() []*Store {
	second := func(f func(c *quota.Charge) string) func(*parts) {
		return func(p *parts) {
			p.key = plainKey
			p.load = func(s *Handle, it item, now quota.Micros) driver.Item {
				if s.serial%2 == 0 && p.fault {
					p.key = f
				}
				return sound().load(s, it, now)
			}
		}
	}
	return []*Store{
		{Name: "the second handle escapes keys in another way", Rule: "C1", Clause: "whatever bytes the key has", Case: "two handles", Says: "by another handle", alter: second(func(c *quota.Charge) string {
			if k := url.PathEscape(c.Key); strings.ContainsAny(c.Key, "%{") {
				return k + ":" + c.Limit.Name()
			}
			return plainKey(c)
		})},
		{Name: "the second handle shortens long keys", Rule: "C1", Clause: "whatever bytes the key has", Case: "two handles", Says: "by another handle", alter: second(func(c *quota.Charge) string {
			if len(c.Key) > 500 {
				return fmt.Sprint(crc32.ChecksumIEEE([]byte(plainKey(c))))
			}
			return plainKey(c)
		})},
		{Name: "the second handle normalizes a letter", Rule: "C1", Clause: "whatever bytes the key has", Case: "two handles", Says: "by another handle", alter: second(func(c *quota.Charge) string {
			return strings.ReplaceAll(plainKey(c), "e\u0301", "é")
		})},
		{Name: "a list writes special keys in another way", Rule: "C1", Clause: "whatever bytes the key has", Case: "two handles", Says: "ChargeAll", alter: func(p *parts) {
			long := false
			p.key = func(c *quota.Charge) string {
				if p.fault && long && strings.Contains(c.Key, "%") {
					return url.PathEscape(plainKey(c))
				}
				return plainKey(c)
			}
			p.begin = func(cs []quota.Charge) { long = len(cs) > 1 }
		}},
		{Name: "a limit is known by its address", Rule: "C1", Clause: "every limit", Case: "two handles", Says: "differing in Remaining", alter: keying(func(c *quota.Charge) string {
			return fmt.Sprintf("%p %s", c.Limit, c.Key)
		})},
		{Name: "the second handle writes names of limits in lower case", Rule: "C1", Clause: "every limit", Case: "two handles", Says: "by another handle", alter: second(func(c *quota.Charge) string {
			return c.Key + ":" + strings.ToLower(c.Limit.Name())
		})},
		{Name: "the second handle knows ids of one byte by its own number", Rule: "C3", Clause: "a request id is granted once", Case: "handles", Says: "want", alter: naming(func(s *Handle, c *quota.Charge) string {
			if len(c.ID) == 1 {
				return fmt.Sprint(sound().id(s, c), s.serial)
			}
			return sound().id(s, c)
		})},
	}
}

// sizes are mutants that fail on large states, keys and lists, or on many.
func sizes() []*Store {
	cut := func(n int) func(s *quota.State) {
		return func(s *quota.State) { s.Tail = s.Tail[:min(len(s.Tail), n)] }
	}
	return []*Store{
		{Name: "the list of a state has 4096 numbers", Rule: "S1", Clause: "on the stored states", Case: "largest states", Says: "remaining -9223372036854775808", alter: holding(cut(4096))},
		{Name: "the list of a state has one number less than the longest", Rule: "S1", Clause: "on the stored states", Case: "largest states", Says: "remaining -9223372036854775808", alter: holding(cut(quota.MaxTail - 1))},
		{Name: "a state of more than 64 KiB is lost", Rule: "S1", Clause: "on the stored states", Case: "largest states", Says: "differing in", alter: holding(func(s *quota.State) {
			if it := (driver.Item{State: *s}); len(it.AppendText(nil)) > 1<<16 {
				*s = quota.State{}
			}
		})},
		{Name: "numbers of a list have 15 digits", Rule: "S1", Clause: "on the stored states", Case: "largest states", Says: "remaining -9223372036854775808", alter: holding(func(s *quota.State) {
			for i, n := range s.Tail {
				s.Tail[i] = max(n, -999_999_999_999_999)
			}
		})},
		{Name: "keys are cut to 1024 bytes", Rule: "C1", Clause: "whatever bytes the key has", Case: "largest keys", Says: "differing in Remaining", alter: keying(func(c *quota.Charge) string {
			k := plainKey(c)
			return k[:min(len(k), 1024)]
		})},
		{Name: "keys are cut one byte before the end of the longest", Rule: "C1", Clause: "key has a quota of its own", Case: "largest keys", Says: "differing in Remaining", alter: keying(func(c *quota.Charge) string {
			return c.Limit.Name() + ":" + c.Key[:min(len(c.Key), quota.MaxKey-1)]
		})},
		{Name: "keys have 16 bits", Rule: "C1", Clause: "key has a quota of its own", Case: "thousands", Says: "a fresh key after", alter: keying(func(c *quota.Charge) string {
			return fmt.Sprint(crc32.ChecksumIEEE([]byte(plainKey(c))) >> 16)
		})},
		{Name: "a thousand keys are kept", Rule: "C1", Clause: "key has a quota of its own", Case: "thousands", Says: "a key of", alter: forgetting(1000, false)},
		{Name: "the charges of a list behind the 32nd get the decision of that one", Rule: "S2", Clause: "a list is charged whole", Case: "every length", Says: "a list of ", alter: telling32},
		{Name: "the last charge of the longest list is not made", Rule: "S2", Clause: "a list is charged whole", Case: "every length", Says: "a list of ", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				err := driver.Apply(cs, items, now, out)
				if p.fault && len(cs) == quota.MaxCharges {
					items[len(cs)-1].Write = false
				}
				return err
			}
		}},
		{Name: "lists of more than 16 charges share a buffer with other calls", Rule: "S2", Clause: "a list is charged whole", Case: "every length", Says: "other goroutines", alter: sharing16},
	}
}

func telling32(p *parts) {
	p.reply = func(cs []quota.Charge, out []quota.Decision, err error) error {
		for i := 32; i < len(out) && p.fault; i++ {
			out[i] = out[31]
		}
		return err
	}
}

// sharing16 keeps the decisions of long lists in one buffer, under a lock, and copies them out under the lock again: another
// call may come in between.
func sharing16(p *parts) {
	var mu sync.Mutex
	var buffer [quota.MaxCharges]quota.Decision
	p.send = func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
		err := s.once(ctx, cs, out)
		if len(cs) > 16 {
			mu.Lock()
			copy(buffer[:], out)
			if s.fault {
				mu.Unlock()
				time.Sleep(10 * time.Microsecond)
				mu.Lock()
			}
			copy(out, buffer[:])
			mu.Unlock()
		}
		return err
	}
}

// closing are mutants of Close.
func closing() []*Store {
	wait := func(wait func(s *Handle, ctx context.Context)) func(*parts) {
		return sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			if s.fault {
				wait(s, ctx)
			}
			return s.once(ctx, cs, out)
		})
	}
	return []*Store{
		{Name: "a call that is in flight when the store is closed is charged, and is ErrClosed", Rule: "S4", Clause: "one that returns an error charged nothing", Case: "calls in flight at Close", Says: "tokens are charged; want", alter: sent(
			func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
				err := s.once(ctx, cs, out)
				if closed := s.gate.Open(); s.fault && err == nil && closed != nil {
					return closed
				}
				return err
			})},
		{Name: "a call that is in flight when the store is closed is granted, and not charged", Rule: "S4", Clause: "a call that returns nil charged once", Case: "calls in flight at Close", Says: "tokens are charged; want", alter: sent(
			func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
				err := s.once(ctx, cs, out)
				if closed := s.gate.Open(); s.fault && err == nil && closed != nil && cs[0].Op == quota.OpTake {
					back := slices.Clone(cs)
					for i := range back {
						back[i].Op, back[i].MadeAt = quota.OpRefund, out[i].At
					}
					return s.once(ctx, back, make([]quota.Decision, len(cs)))
				}
				return err
			})},
		{Name: "the first charge of a list in flight is made when the store is closed", Rule: "S4", Clause: "one that returns an error charged nothing", Case: "calls in flight at Close", Says: "tokens are charged; want", alter: sent(
			func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
				for n := 0; len(cs) > 1 && n < 5 && s.gate.Open() == nil; n++ {
					runtime.Gosched()
				}
				if closed := s.gate.Open(); closed != nil {
					if s.fault && len(cs) > 1 {
						s.once(ctx, cs[:1], out[:1])
					}
					return closed
				}
				return s.once(ctx, cs, out)
			})},
		{Name: "Close is an error while another Close is under way", Rule: "S8", Clause: "afterwards every call is ErrClosed", Case: "several callers of Close", Says: "error: closing", alter: func(p *parts) {
			var mu sync.Mutex
			p.close = func(s *Handle) error {
				if !mu.TryLock() {
					if s.fault {
						return errors.New("closing")
					}
					mu.Lock()
				}
				defer mu.Unlock()
				s.gate.Close()
				time.Sleep(100 * time.Microsecond)
				return nil
			}
		}},
		{Name: "Close returns while another Close is under way, and calls are decided", Rule: "S8", Clause: "afterwards every call is ErrClosed", Case: "several callers of Close", Says: "want quota.ErrClosed", alter: func(p *parts) {
			var mu sync.Mutex
			p.close = func(s *Handle) error {
				if !mu.TryLock() {
					if s.fault {
						return nil
					}
					mu.Lock()
				}
				defer mu.Unlock()
				time.Sleep(time.Millisecond)
				s.gate.Close()
				return nil
			}
		}},
		{Name: "each call leaves a goroutine until its context ends", Rule: "S8", Clause: "no goroutine is left", Case: "lasting contexts", Says: "goroutines more", alter: wait(func(_ *Handle, ctx context.Context) {
			if ctx.Done() != nil {
				go func() { <-ctx.Done() }()
			}
		})},
		{Name: "each call derives a context and does not end it", Rule: "S8", Clause: "no goroutine is left", Case: "lasting contexts", Says: "goroutines more", alter: wait(func(_ *Handle, ctx context.Context) {
			_, cancel := context.WithCancel(ctx)
			_ = cancel
		})},
		{Name: "the first call of a store leaves a goroutine until its context ends", Rule: "S8", Clause: "no goroutine is left", Case: "lasting contexts", Says: "goroutines more", alter: func(p *parts) {
			var once sync.Once
			wait(func(_ *Handle, ctx context.Context) {
				if ctx.Done() != nil {
					once.Do(func() { go func() { <-ctx.Done() }() })
				}
			})(p)
		}},
		{Name: "a denied call leaves a goroutine for a minute", Rule: "S8", Clause: "no goroutine is left", Case: "lasting contexts", Says: "goroutines more", alter: sent(
			func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
				err := s.once(ctx, cs, out)
				if s.fault && err == nil && !quota.Granted(out) {
					go func() { time.Sleep(time.Minute) }()
				}
				return err
			})},
	}
}

// splits are mutants that take lists in parts.
func splits() []*Store {
	said := func(name, of, says string, tell func(c *quota.Charge, d *quota.Decision, granted bool)) *Store {
		return &Store{Name: "of a list in parts " + name, Rule: "C6", Clause: "taken in parts that are given back", Case: of, Says: says, Grade: driver.OneGroup, alter: parting(manner{tell: tell})}
	}
	const verdicts = "verdicts of parts"
	return []*Store{
		{Name: "says one group, and marks lists of one group", Rule: "C6", Clause: "marked Split", Case: "one part", Says: "split", Grade: driver.OneGroup, alter: parting(manner{unmarked: func(groups int, _ bool) bool { return groups == 1 }})},
		{Name: "says one group, and does not mark lists that are denied", Rule: "C6", Clause: "marked Split", Case: "marked when denied", Says: "want quota.ErrCrossSlot, or Split set", Grade: driver.OneGroup, alter: parting(manner{unmarked: func(groups int, granted bool) bool { return groups > 1 && !granted }})},
		{Name: "says one group, and does not mark lists that are granted", Rule: "C6", Clause: "marked Split", Case: "marked", Says: "want quota.ErrCrossSlot, or Split set", Grade: driver.OneGroup, alter: parting(manner{unmarked: func(groups int, granted bool) bool { return groups > 1 && granted }})},
		{Name: "says one group, and gives nothing back", Rule: "C6", Clause: "taken in parts that are given back", Case: "beyond", Says: "where the right answer, but for times and the mark", Grade: driver.OneGroup, alter: parting(manner{keep: true})},
		{Name: "says one group, and takes alternatives in parts, as a list", Rule: "C6", Clause: "alternatives beyond it are never taken in parts", Case: "alternatives", Says: "want quota.ErrCrossSlot, or one step", Grade: driver.OneGroup, alter: parting(manner{first: true})},
		{Name: "says one key, and charges each alternative that fits", Rule: "C6", Clause: "alternatives beyond it are never taken in parts", Case: "alternatives", Says: "want quota.ErrCrossSlot, or one step", Grade: driver.OneKey, alter: apart},
		said("RetryAfter is not told", verdicts, "differing in RetryAfter", func(_ *quota.Charge, d *quota.Decision, _ bool) { d.RetryAfter = 0 }),
		said("RetryAfter is told in whole seconds", verdicts, "differing in RetryAfter", func(_ *quota.Charge, d *quota.Decision, _ bool) {
			if d.RetryAfter < quota.Never {
				d.RetryAfter = d.RetryAfter.Round(time.Second)
			}
		}),
		said("ResetAfter is not told", verdicts, "differing in ResetAfter", func(_ *quota.Charge, d *quota.Decision, _ bool) { d.ResetAfter = 0 }),
		said("ResetAfter of a denial is not told", verdicts, "differing in ResetAfter", func(_ *quota.Charge, d *quota.Decision, granted bool) {
			if !granted {
				d.ResetAfter = 0
			}
		}),
		said("At is not told", verdicts, "at a time of the call", func(_ *quota.Charge, d *quota.Decision, _ bool) { d.At = 0 }),
		said("At is a second late", verdicts, "at a time of the call", func(_ *quota.Charge, d *quota.Decision, _ bool) { d.At += 1_000_000 }),
		{Name: "of a list in parts all decisions tell the time of the first part", Rule: "C6", Clause: "taken in parts that are given back", Case: "verdicts of parts, own clock", Says: "differing in ResetAfter", Grade: driver.OneGroup, alter: parting(manner{one: true})},
		said("Limit is not told", verdicts, "differing in Limit", func(_ *quota.Charge, d *quota.Decision, _ bool) { d.Capacity = 0 }),
		said("a denial is told with what was charged for a moment", verdicts, "differing in Charged", func(c *quota.Charge, d *quota.Decision, granted bool) {
			if !granted && d.Allowed && c.Op == quota.OpTake {
				d.Charged = c.Cost
			}
		}),
		said("a charge that fits is told as denied, if another one is", verdicts, "differing in Allowed", func(_ *quota.Charge, d *quota.Decision, granted bool) { d.Allowed = d.Allowed && granted }),
		{Name: "says one group, and a list over several is ErrInvalid", Rule: "C6", Clause: "a list beyond Atomicity is ErrCrossSlot", Case: "beyond", Says: "want quota.ErrCrossSlot", Grade: driver.OneGroup, alter: sent(
			func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
				for i := range cs {
					if quota.Group(cs[i].Key) != quota.Group(cs[0].Key) {
						if s.fault {
							return fmt.Errorf("mutant: %w: several groups", quota.ErrInvalid)
						}
						return fmt.Errorf("mutant: %w: several groups", quota.ErrCrossSlot)
					}
				}
				return s.once(ctx, cs, out)
			})},
	}
}

// panicking are mutants that do not bear a panic of the user's code.
func panicking() []*Store {
	// caught runs a call, and f with the number of panics before it if it panics.
	caught := func(f func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision)) func(*parts) {
		return sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			defer func() {
				if v := recover(); v != nil {
					if s.fault {
						f(s, ctx, cs, out)
					}
					panic(v)
				}
			}()
			return s.once(ctx, cs, out)
		})
	}
	// afterPanic returns a mark that is set when a call panics.
	afterPanic := func(p *parts) *atomic.Bool {
		var set atomic.Bool
		caught(func(*Handle, context.Context, []quota.Charge, []quota.Decision) { set.Store(true) })(p)
		return &set
	}
	good := func(c quota.Charge) bool { return c.Limit.Name() == "good" }
	return []*Store{
		{Name: "a panic leaves the charges before it", Rule: "S4", Clause: "one that returns an error charged nothing", Case: "panics at each point", Says: "tokens charged", alter: caught(
			func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) {
				for i := range cs {
					if !good(cs[i]) {
						break
					}
					c := cs[i]
					c.ID = ""
					s.once(ctx, []quota.Charge{c}, out[i:i+1])
				}
			})},
		{Name: "a panic leaves the debits of a list", Rule: "S4", Clause: "one that returns an error charged nothing", Case: "panics at each point", Says: "tokens charged", alter: caught(
			func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) {
				for i, c := range cs {
					if c.ID = ""; good(c) && c.Op == quota.OpDebit {
						s.once(ctx, []quota.Charge{c}, out[i:i+1])
					}
				}
			})},
		{Name: "a panic leaves a single charge half made", Rule: "S4", Clause: "one that returns an error charged nothing", Case: "panics at each point", Says: "tokens charged", alter: caught(
			func(s *Handle, _ context.Context, cs []quota.Charge, _ []quota.Decision) {
				s.data.mu.Lock()
				defer s.data.mu.Unlock()
				if len(cs) == 1 && cs[0].Op == quota.OpRefund {
					delete(s.data.items, s.key(&cs[0]))
				}
			})},
		{Name: "a panic leaves the id in use", Rule: "S4", Clause: "one that returns an error charged nothing", Case: "panics at each point", Says: "want decisions", alter: func(p *parts) {
			used := map[string]bool{}
			var mu sync.Mutex
			caught(func(s *Handle, _ context.Context, cs []quota.Charge, _ []quota.Decision) {
				mu.Lock()
				defer mu.Unlock()
				if cs[0].ID != "" {
					used[quota.Group(cs[0].Key)] = true
				}
			})(p)
			send := p.send
			p.send = func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
				mu.Lock()
				busy := used[quota.Group(cs[0].Key)] && cs[0].ID != ""
				mu.Unlock()
				if busy {
					return fmt.Errorf("mutant: %w: the id is in use", quota.ErrMisconfigured)
				}
				return send(s, ctx, cs, out)
			}
		}},
		{Name: "a panic that is an error is returned as a decision", Rule: "S4", Clause: "one that returns an error charged nothing", Case: "panics at each point", Says: "want the panic or an error", alter: sent(
			func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) (err error) {
				defer func() {
					switch v := recover().(type) {
					case nil:
					case error:
						if err = fmt.Errorf("mutant: %w: %v", quota.ErrMisconfigured, v); s.fault {
							err = nil
						}
					default:
						panic(v)
					}
				}()
				return s.once(ctx, cs, out)
			})},
		{Name: "a panic in a denied list leaves a lock held", Rule: "S4", Clause: "one that returns an error charged nothing", Case: "panics at each point", Says: "no call has returned", alter: func(p *parts) {
			var mu sync.Mutex
			p.send = func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
				mu.Lock()
				free := true
				defer func() {
					if free {
						mu.Unlock()
					}
				}()
				free = !s.fault || len(cs) == 1 || cs[0].Cost < 1<<20
				err := s.once(ctx, cs, out)
				free = true
				return err
			}
		}},
		{Name: "a panic of the clock leaves a lock held", Rule: "S4", Clause: "a call that returns nil charged once", Case: "panics of the clock", Says: "no call has returned", alter: func(p *parts) {
			var mu sync.Mutex
			p.now = func(s *Handle) quota.Micros {
				mu.Lock()
				if !s.fault {
					defer mu.Unlock()
				}
				now := sound().now(s)
				if s.fault {
					mu.Unlock()
				}
				return now
			}
		}},
		{Name: "the clock is read between two charges of a list, and may panic", Rule: "S4", Clause: "one that returns an error charged nothing", Case: "panics of the clock", Says: "tokens charged", alter: sent(
			func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
				err := s.once(ctx, cs, out)
				if err == nil && quota.Granted(out) && len(cs) > 1 && cs[0].Op == quota.OpTake && cs[0].Cost > 0 {
					defer func() {
						if v := recover(); v != nil {
							if s.fault { // the first charge is taken back, and the others are not
								refund := cs[0]
								refund.Op, refund.MadeAt, refund.ID = quota.OpRefund, out[0].At, ""
								s.once(ctx, []quota.Charge{refund}, make([]quota.Decision, 1))
							}
							panic(v)
						}
					}()
					s.now(s)
				}
				return err
			})},
		{Name: "a call beside one that panics is lost", Rule: "S4", Clause: "a call that returns nil charged once", Case: "panics beside others", Says: "tokens charged", alter: func(p *parts) {
			poisoned := afterPanic(p)
			send := p.send
			p.send = func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
				bad := cs[0].Op == quota.OpTake && len(cs) == 1 && poisoned.Swap(false)
				err := send(s, ctx, cs, out)
				if bad && err == nil && quota.Granted(out) {
					refund := cs[0]
					refund.Op, refund.MadeAt, refund.ID = quota.OpRefund, 1<<53, ""
					return s.once(ctx, []quota.Charge{refund}, make([]quota.Decision, 1))
				}
				return err
			}
		}},
		{Name: "a panic ends the call of another one too", Rule: "S4", Clause: "a call that returns nil charged once", Case: "panics beside others", Says: "another caller's panic", alter: func(p *parts) {
			poisoned := afterPanic(p)
			send := p.send
			p.send = func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
				if poisoned.Swap(false) {
					panic("another caller's panic")
				}
				return send(s, ctx, cs, out)
			}
		}},
	}
}

// unclocked are mutants whose clock the suite cannot set.
func unclocked() []*Store {
	short := func(name, says string, f func(reset time.Duration) time.Duration) *Store {
		return &Store{Name: "without a clock, " + name, Rule: "S5", Clause: "state is kept at least until its ResetAfter has passed", Case: "long lives", Says: says, OwnClock: true, alter: living(f)}
	}
	kept := func(name, of string, alter func(*parts)) *Store {
		return &Store{Name: "without a clock, " + name, Rule: "C3", Clause: "a request id is granted once", Case: of, Says: "after it was granted", OwnClock: true, alter: alter}
	}
	const differs = "differing in"
	return []*Store{
		short("a state lives for half of its time", differs, func(reset time.Duration) time.Duration { return reset / 2 }),
		short("a state lives for half of its time and the slack", differs, func(reset time.Duration) time.Duration { return reset/2 + driver.ExpirySlack }),
		short("a state lives for three quarters of its time and the slack", differs, func(reset time.Duration) time.Duration { return reset/4*3 + driver.ExpirySlack }),
		short("a state lives in milliseconds that are taken for microseconds", differs, func(reset time.Duration) time.Duration { return reset/1000 + driver.ExpirySlack }),
		short("a state lives five seconds at most", differs, func(reset time.Duration) time.Duration { return min(reset, 5*time.Second) }),
		kept("an id is forgotten after a second", "own clock", windowed(time.Second)),
		kept("an id is forgotten after five seconds", "own clock", windowed(5*time.Second)),
		kept("an id is kept in milliseconds that are taken for microseconds", "own clock", windowed(quota.IDWindow/1000)),
		kept("an id lives as long as the state", "own clock", func(p *parts) {
			window := p.window
			p.record = func(cs []quota.Charge, out []quota.Decision) (grant, bool) {
				if p.window = window; p.fault {
					p.window = min(window, out[0].ResetAfter+driver.ExpirySlack)
				}
				return sound().record(cs, out)
			}
		}),
	}
}

func windowed(window time.Duration) func(*parts) {
	return func(p *parts) {
		if p.fault {
			p.window = window
		}
	}
}
