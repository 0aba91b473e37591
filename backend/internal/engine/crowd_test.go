package engine

import (
	"cmp"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/quota"
)

// A group of a cluster that gets thousands of different keys is told, once, by a text that names it and the cure. Few keys are
// not, however often they are charged, nor many groups, nor keys that come over a long time, nor a single server's.
func TestCrowdedGroup(t *testing.T) {
	const many = 10_000
	for _, test := range []struct {
		name    string
		calls   int // 0 is many
		single  bool
		key     func(i int) string
		notices int
	}{
		{name: "10 000 keys under one tag", key: func(i int) string { return fmt.Sprint("ip/", i) }, notices: 1},
		{name: "10 000 keys under each of two tags", calls: 2 * many, key: func(i int) string { return fmt.Sprintf("%d/%d", i%2, i) }, notices: 2},
		{name: "10 000 keys under one tag among other groups", calls: 2 * many, key: func(i int) string { return []string{fmt.Sprint("ip/", i), fmt.Sprint(i, "/a")}[i%2] }, notices: 1},
		{name: "10 000 calls to 10 keys", key: func(i int) string { return fmt.Sprint("ip/", i%10) }},
		{name: "10 000 keys in 10 000 groups", key: func(i int) string { return fmt.Sprint(i, "/ip") }},
		{name: "10 000 keys of one segment", key: func(i int) string { return fmt.Sprint(i) }},
		{name: "many keys in groups of ten", calls: testenv.Sized(100_000, 1_000_000), key: func(i int) string { return fmt.Sprintf("%d/%d", i/10, i) }},
		{name: "10 000 keys under one tag of a server", single: true, key: func(i int) string { return fmt.Sprint("ip/", i) }},
		{name: "10 000 keys under each of many tags", calls: 20 * many, key: func(i int) string { return fmt.Sprintf("%d/%d", i/many, i) }, notices: maxCrowdNotices},
	} {
		t.Run(test.name, func(t *testing.T) {
			var told []string
			s, err := New(fake(nil), !test.single, Options{Notice: func(n quota.Notice) { told = append(told, n.Name+": "+n.Text) }})
			if err != nil {
				t.Fatal(err)
			}
			for i := range cmp.Or(test.calls, many) {
				s.counts(test.key(i))
			}
			if len(told) != test.notices {
				t.Fatalf("notices: got %q, want %d", told, test.notices)
			}
			for _, text := range told {
				if !strings.HasPrefix(text, "group: ") || !strings.Contains(text, "the segment that differs first") || !strings.Contains(text, `"`+quota.Group(test.key(0))+`"`) && test.notices == 1 {
					t.Errorf("notice: got %q, want the group and the cure", text)
				}
			}
			if n := len(s.crowds.groups); n > maxCrowdGroups {
				t.Errorf("groups that are counted: got %d, want up to %d", n, maxCrowdGroups)
			}
		})
	}
	t.Run("keys over a long time", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := newCrowds()
			for i := range many {
				time.Sleep(time.Second)
				if c.saw(fmt.Sprint("ip/", i)) {
					t.Fatalf("%d keys in %d s: got a crowd, want none", i+1, i+1)
				}
			}
		})
	})
}

// Counting is no cost worth naming beside a round trip.
func BenchmarkCrowds(b *testing.B) {
	c, keys := newCrowds(), make([]string, 1000)
	for i := range keys {
		keys[i] = fmt.Sprintf("team-%d/agent-%d", i%100, i)
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		c.saw(keys[i%len(keys)])
	}
}
