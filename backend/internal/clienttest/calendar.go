package clienttest

import (
	"fmt"
	"testing"
	"time"
	_ "time/tzdata"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// calendars: processes whose clocks are wrong decide in the windows of the server's clock, to the microsecond, with one more
// script call in the life of a process at most. A charge is made once, alone, in a list, and beside others in a batch.
func calendars(t *testing.T, l library) {
	t.Parallel()
	server := redisserver.StartConfig(t, redisserver.Config{FakeTime: true})
	raw := redis.NewClient(&redis.Options{Addr: server.Addr()})
	t.Cleanup(func() { raw.Close() })
	data, open := vouched(l.data(t, raw, single(server)))

	// The server's clock shows ten minutes to the 15th of April 2027 in Berlin.
	end := quota.Must(time.Parse(time.RFC3339, "2027-04-15T00:00:00+02:00"))
	begin := quota.Must(time.Parse(time.RFC3339, "2027-03-15T00:00:00+01:00"))
	offset := time.Until(end) - 10*time.Minute
	ok(t, server.SetClock(offset))
	month := limitOf("month", algorithm.Calendar(100, algorithm.Monthly(15).In("Europe/Berlin")))
	bucket := yearly("bucket", 100)

	// process opens a store whose process's clock is off from the server's, and makes it ready.
	process := func(off time.Duration) (store, *engine.Store) {
		s := open(engine.Options{})
		e := l.engine(s)
		engine.Skew(e, offset+off)
		take(t, s, quota.Charge{Limit: bucket, Key: "warm", Cost: 1})
		data.resetCounts(t)
		return s, e
	}
	calls := func() int {
		n := data.count(t)
		data.resetCounts(t)
		return n["eval"].calls + n["evalsha"].calls - n["evalsha"].failed
	}
	left := func(s quota.Store, l *quota.Limit, key string) int64 {
		return take(t, s, quota.Charge{Limit: l, Key: key, Op: quota.OpPeek}).Remaining
	}
	const months = 60 * 24 * time.Hour // behind, so that the server's time is in none of the three windows

	for _, p := range []struct {
		name  string
		off   time.Duration
		again int // script calls in the life of the process above one a decision
	}{{"two months behind", -months, 1}, {"two years ahead", 2 * year, 1}, {"30 minutes ahead", 30 * time.Minute, 0}, {"right", 0, 0}} {
		s, _ := process(p.off)
		key := p.name
		for i := range 3 {
			if d := take(t, s, quota.Charge{Limit: month, Key: key, Cost: 33}); !d.Allowed || d.Remaining != int64(100-33*(i+1)) {
				t.Errorf("%s: take %d of 33: got %+v, want %d remaining", p.name, i+1, d, 100-33*(i+1))
			}
		}
		d := take(t, s, quota.Charge{Limit: month, Key: key, Cost: 2})
		if got := d.At.Time().Add(d.RetryAfter); d.Allowed || !got.Equal(end) {
			t.Errorf("%s: a take of 2 more: got it allowed: %v, next at %v; want it denied until %v", p.name, d.Allowed, got, end)
		}
		if n := calls(); n != 4+p.again {
			t.Errorf("%s: script calls of 4 decisions: got %d, want %d", p.name, n, 4+p.again)
		}
		it := data.held(t, quota.Charge{Limit: month, Key: key})
		if a, c := number7(it, 11), number7(it, 25); a != begin.UnixMicro() || c != end.UnixMicro() {
			t.Errorf("%s: window of the state: got %d to %d, want %d to %d", p.name, a, c, begin.UnixMicro(), end.UnixMicro())
		}
	}

	// Each operation is made once, also where it is the first of a process.
	for _, test := range []struct {
		name string
		c    quota.Charge
		want int64
	}{
		{"peek", quota.Charge{Op: quota.OpPeek, Cost: 1}, 90},
		{"take above a floor", quota.Charge{Cost: 5, Floor: 80}, 85},
		{"debit", quota.Charge{Op: quota.OpDebit, Cost: 100}, -10},
		{"refund", quota.Charge{Op: quota.OpRefund, Cost: 4, MadeAt: quota.Micros(end.UnixMicro() - 1)}, 94},
		{"reset", quota.Charge{Op: quota.OpReset}, 100},
		{"up to", quota.Charge{Op: quota.OpUpTo, Cost: 1000}, 0},
		{"take with an id", quota.Charge{Cost: 5, ID: "i"}, 85},
	} {
		s, _ := process(-months)
		test.c.Limit, test.c.Key = month, "op "+test.name
		take(t, s, quota.Charge{Limit: month, Key: test.c.Key, Cost: 10})
		for _, off := range []time.Duration{-months, 0} {
			s, _ := process(off)
			d := take(t, s, test.c)
			if n, again := calls(), off != 0; again && n != 2 || !again && n != 1 {
				t.Errorf("%s, %v off: script calls: got %d, want 1, and 1 more where the clock is wrong", test.name, off, n)
			}
			if !d.Allowed || d.Remaining != test.want {
				t.Errorf("%s, %v off: got %+v, want %d remaining", test.name, off, d, test.want)
			}
			if test.c.ID == "" {
				break
			}
			if replay := take(t, s, test.c); !replay.Replayed || replay.Remaining != test.want {
				t.Errorf("%s, again: got %+v, want the first answer, %d remaining", test.name, replay, test.want)
			}
		}
		if got := left(s, month, test.c.Key); got != test.want {
			t.Errorf("%s: remaining: got %d, want %d", test.name, got, test.want)
		}
	}

	// Holds of a month, each operation by a process of its own.
	holds := limitOf("holds", algorithm.Held(algorithm.Calendar(100, algorithm.Monthly(15).In("Europe/Berlin")), time.Hour))
	hold := quota.Charge{Limit: holds, Key: "k", Op: quota.OpHold, Cost: 60}
	first := func(c quota.Charge) quota.Decision {
		s, _ := process(-months)
		d := take(t, s, c)
		if n := calls(); n != 2 {
			t.Errorf("%s: script calls: got %d, want 2", c.Op, n)
		}
		return d
	}
	d := first(hold)
	if over := first(hold); over.Allowed || over.Remaining != 40 {
		t.Errorf("a second hold of 60 of 100: got %+v, want it denied, 40 remaining", over)
	}
	if d = first(hold.Renew(d)); !d.Allowed || d.Remaining != 40 {
		t.Errorf("renew: got %+v, want it allowed, 40 remaining", d)
	}
	if d = first(hold.Settle(d, 50)); !d.Allowed || d.Remaining != 50 || !d.At.Time().Add(d.ResetAfter).Equal(end) {
		t.Errorf("spend of 50: got %+v, want 50 remaining, until %v", d, end)
	}

	// A list is granted or denied as a whole, once.
	for _, test := range []struct {
		name          string
		charges       []quota.Charge
		granted       bool
		bucket, month int64 // remaining
	}{
		{"granted", []quota.Charge{{Limit: bucket, Cost: 3}, {Limit: month, Cost: 4}}, true, 97, 96},
		{"denied by the bucket", []quota.Charge{{Limit: month, Cost: 4}, {Limit: bucket, Cost: 101}}, false, 100, 100},
		{"denied by the month", []quota.Charge{{Limit: bucket, Cost: 3}, {Limit: month, Cost: 101}}, false, 100, 100},
		{"with a shadow", []quota.Charge{{Limit: bucket, Cost: 3}, {Limit: month, Cost: 4, Shadow: true}}, true, 97, 96},
		{"with a debit", []quota.Charge{{Limit: bucket, Cost: 3}, {Limit: month, Op: quota.OpDebit, Cost: 4}}, true, 97, 96},
		{"with an id", []quota.Charge{{Limit: bucket, Cost: 3, ID: "l"}, {Limit: month, Cost: 4, ID: "l"}}, true, 97, 96},
		{"the first alternative", []quota.Charge{{Limit: month, Cost: 4, Alternative: 1}, {Limit: bucket, Cost: 3, Alternative: 2}}, true, 100, 96},
		{"the second alternative", []quota.Charge{{Limit: month, Cost: 101, Alternative: 1}, {Limit: bucket, Cost: 3, Alternative: 2}}, true, 97, 100},
	} {
		s, _ := process(-months)
		key := "list " + test.name
		for i := range test.charges {
			test.charges[i].Key = key
		}
		ds := chargeAll(t, s, test.charges...)
		if n := calls(); n != 2 {
			t.Errorf("list %s: script calls: got %d, want 2", test.name, n)
		}
		if got := quota.Granted(ds); got != test.granted {
			t.Errorf("list %s: granted: got %v, want %v", test.name, got, test.granted)
		}
		if b, m := left(s, bucket, key), left(s, month, key); b != test.bucket || m != test.month {
			t.Errorf("list %s: remaining: got %d of the bucket and %d of the month, want %d and %d", test.name, b, m, test.bucket, test.month)
		}
	}

	// Of a batch only the charges are sent again for which the numbers did not serve. With request ids each is made once all the
	// same, and a process whose clock is wrong need not send a repetition again.
	for _, id := range []string{"", "id "} {
		name := "batch " + id
		var together [][]quota.Charge
		for i := range 5 {
			key := fmt.Sprint(name, i%2)
			n := 0
			list := func(cs ...quota.Charge) {
				for j := range cs {
					if cs[j].Cost = 1; id != "" {
						cs[j].ID = fmt.Sprint(id, i, " ", n)
					}
				}
				n++
				together = append(together, cs)
			}
			list(quota.Charge{Limit: month, Key: key})
			list(quota.Charge{Limit: bucket, Key: key})
			list(quota.Charge{Limit: month, Key: key}, quota.Charge{Limit: bucket, Key: key})
			list(quota.Charge{Limit: bucket, Key: key}, quota.Charge{Limit: bucket, Key: name + "other"})
		}
		for _, again := range []bool{false, true} {
			if again && id == "" {
				break
			}
			s, e := process(-months)
			ds, errs := engine.Together(bg, e, together)
			for i := range together {
				if errs[i] != nil || !quota.Granted(ds[i]) || ds[i][0].Replayed != again {
					t.Errorf("item %d of a batch, again: %v: got %v, %v, want it granted", i, again, ds[i], errs[i])
				}
			}
			if n := calls(); n != map[bool]int{false: 2, true: 1}[again] {
				t.Errorf("script calls of a batch, again: %v: got %d, want 2, and 1 where it is repeated", again, n)
			}
			for i, want := range [][2]int64{{94, 91}, {96, 94}} {
				key := fmt.Sprint(name, i)
				if m, b := left(s, month, key), left(s, bucket, key); m != want[0] || b != want[1] {
					t.Errorf("%s: remaining: got %d of the month and %d of the bucket, want %v", key, m, b, want)
				}
			}
		}
	}

	// A server's clock that is set to the next window, and on by a year, makes no error. Compare-and-swap decides alike.
	s, _ := process(30 * time.Minute)
	berlin := quota.Must(time.LoadLocation("Europe/Berlin"))
	swaps := limitOf("swaps", hidden{month.Algorithm()})
	for _, l := range []*quota.Limit{month, swaps} {
		take(t, s, quota.Charge{Limit: l, Key: "step", Cost: 100})
	}
	for _, step := range []time.Duration{11 * time.Minute, year, year} {
		offset += step
		ok(t, server.SetClock(offset))
		for _, l := range []*quota.Limit{month, swaps} {
			d := take(t, s, quota.Charge{Limit: l, Key: "step", Cost: 100})
			at, after := d.At.Time().In(berlin), time.Month(0)
			if at.Day() >= 15 {
				after = 1
			}
			want := time.Date(at.Year(), at.Month()+after, 15, 0, 0, 0, 0, berlin)
			if got := d.At.Time().Add(d.ResetAfter); !d.Allowed || !got.Equal(want) {
				t.Errorf("%s, clock %v on: got it allowed: %v, reset at %v; want it allowed, until %v", l.Name(), step, d.Allowed, got, want)
			}
		}
	}
}

// number7 reads a number of a state.
func number7(state string, at int) (n int64) {
	if len(state) < at+7 {
		return 0
	}
	for _, b := range []byte(state[at : at+7]) {
		n = n<<8 | int64(b)
	}
	return n
}

// calendarsOfCluster: the same on a cluster, where a list over several slots is split.
func calendarsOfCluster(t *testing.T, l library) {
	_, open := l.cluster(t)
	month, day := limitOf("month", algorithm.Calendar(100, algorithm.Monthly(31))), limitOf("day", algorithm.Calendar(100, algorithm.Daily().In("Asia/Shanghai")))
	for _, off := range []time.Duration{-3 * 30 * 24 * time.Hour, 0, 3 * 30 * 24 * time.Hour} {
		s := open(engine.Options{})
		engine.Skew(l.engine(s), off)
		key := fmt.Sprint("off ", off)
		ds := chargeAll(t, s, quota.Charge{Limit: month, Key: key, Cost: 60}, quota.Charge{Limit: day, Key: "other " + key, Cost: 70})
		if !quota.Granted(ds) || ds[0].Remaining != 40 || ds[1].Remaining != 30 {
			t.Errorf("%v off: got %+v, want it granted, 40 and 30 remaining", off, ds)
		}
		ds = chargeAll(t, s, quota.Charge{Limit: month, Key: key, Cost: 10}, quota.Charge{Limit: day, Key: "other " + key, Cost: 70})
		if quota.Granted(ds) || ds[0].Remaining != 40 || ds[1].Remaining != 30 {
			t.Errorf("%v off: got %+v, want it denied, 40 and 30 remaining", off, ds)
		}
	}
}
