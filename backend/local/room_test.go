package local

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// Groups that flood the store with keys, or with request ids, leave room to the others: one takes half, two a third each.
func TestGroupsLeaveRoom(t *testing.T) {
	const most = 400
	l := bucket("n", 1<<40, 1000*time.Hour)
	for what, charge := range map[string]func(group string, n int) quota.Charge{
		"keys":        func(group string, n int) quota.Charge { return quota.Charge{Key: fmt.Sprintf("%s/%d", group, n)} },
		"request ids": func(group string, n int) quota.Charge { return quota.Charge{Key: group, ID: fmt.Sprint(n)} },
	} {
		t.Run(what, func(t *testing.T) {
			for _, flooding := range []int{1, 2, 9} {
				s := quota.Must(NewWithOptions(Options{MaxKeys: most, MaxIDs: most, Clock: newClock().time}))
				r := &s.keys
				if what == "request ids" {
					r = &s.ids
				}
				groups := groupsApart(s, flooding+1)
				take := func(group, n int) error {
					c := charge(groups[group], n)
					c.Limit, c.Cost = l, 1
					_, err := s.Charge(bg, c)
					if err != nil && (!errors.Is(err, quota.ErrOverloaded) || !strings.Contains(err.Error(), "group") || !strings.Contains(err.Error(), what)) {
						t.Fatalf("take: got %v, want ErrOverloaded that names the group and %s", err, what)
					}
					return err
				}
				got := make([]int, flooding)
				for n := range 2 * most {
					for group := range flooding {
						if take(group, n) == nil {
							got[group]++
						}
					}
				}
				share := most / (flooding + 1)
				for group := range flooding {
					if got[group] < share-2 || got[group] > share+2 {
						t.Errorf("%s of group %d of %d that flood: got %d of %d, want %d", what, group, flooding, got[group], most, share)
					}
				}
				for n := range share / 2 {
					if err := take(flooding, n); err != nil {
						t.Errorf("%s %d of another group beside %d that flood: got %v, want nil", what, n, flooding, err)
						break
					}
				}
				if err := take(0, 0); err != nil { // a key that it has, an id that it repeats
					t.Errorf("the first of group 0: got %v, want nil", err)
				}
				if used := r.used.Load(); used > most {
					t.Errorf("%s: got %d, want %d at most", what, used, most)
				}
				s.checkAll(t)
			}
		})
	}
}

// groupsApart returns the names of groups that are counted apart, which two in 4096 are not.
func groupsApart(s *Store, n int) (names []string) {
	taken := map[uint64]bool{}
	for i := 0; len(names) < n; i++ {
		name := fmt.Sprint("team-", i)
		if class := s.classOf(name); !taken[class] {
			taken[class] = true
			names = append(names, name)
		}
	}
	return names
}

// Keys of one segment are groups of their own, and fill the store; a group gets its share back when its keys are whole.
func TestRoomComesBack(t *testing.T) {
	const most = 10_000
	s, c := withClock(most)
	l, brief := bucket("n", 10, 1000*time.Hour), bucket("n", 10, 10*time.Second)
	for i := range most / 2 {
		take(t, s, quota.Charge{Limit: brief, Key: fmt.Sprint("team/", i), Cost: 1})
	}
	more := quota.Charge{Limit: brief, Key: "team/more", Cost: 1}
	if _, err := s.Charge(bg, more); !errors.Is(err, quota.ErrOverloaded) {
		t.Errorf("take of a key beyond the group's share: got %v, want ErrOverloaded", err)
	}
	c.add(time.Second)
	take(t, s, more)
	for i := range most - 1 {
		take(t, s, quota.Charge{Limit: l, Key: fmt.Sprint(i), Cost: 1})
	}
	if s.Len() != most {
		t.Errorf("keys: got %d, want %d", s.Len(), most)
	}
	s.checkAll(t)
}

// However often a store without room refuses new keys, while no key is whole, the refusals soon look at none.
func TestRefusalsAreCheap(t *testing.T) {
	s, c := withClock(10_000)
	l := bucket("n", 10, time.Hour)
	for i := range 10_000 {
		take(t, s, quota.Charge{Limit: l, Key: fmt.Sprint(i), Cost: 1})
	}
	refuse := func() {
		t.Helper()
		if _, err := s.Charge(bg, quota.Charge{Limit: l, Key: "more", Cost: 1}); !errors.Is(err, quota.ErrOverloaded) {
			t.Fatalf("take of a key more: got %v, want ErrOverloaded", err)
		}
	}
	hands := func() (all [shardCount]int) {
		for i := range s.shards {
			all[i] = s.shards[i].hand
		}
		return all
	}
	for range 30 {
		refuse()
	}
	before := hands()
	for range 30 {
		refuse()
	}
	if hands() != before {
		t.Error("places looked at by the later refusals: got some, want none")
	}
	take(t, s, quota.Charge{Limit: l, Key: "5", Op: quota.OpReset})
	take(t, s, quota.Charge{Limit: l, Key: "more", Cost: 1})
	c.add(7 * time.Minute) // 1 of 10 an hour
	take(t, s, quota.Charge{Limit: l, Key: "more and more", Cost: 1})
	s.checkAll(t)
}
