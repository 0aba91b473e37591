package engine

import (
	"fmt"
	"hash/maphash"
	"maps"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// On a cluster all keys of a group are in one slot, and so on one node. A program that puts a kind of key in front, as in
// ip/203.0.113.9, has one node do the work of all; it hears of that by a notice.

// crowds counts the different keys of each group, by a sample of them: those whose hash is in one of crowdSample parts. A key
// is in the sample or it is not, however often it is charged. So fewer than crowdSize keys never make a crowd, and of 1000
// keys more than crowdSize are in the sample with a probability of 1e-18. Its methods may be called concurrently.
type crowds struct {
	seed maphash.Seed

	mu     sync.Mutex
	since  time.Time
	groups map[string]map[uint64]struct{} // the hashes of keys in the sample
	told   map[string]bool
}

const (
	crowdSample = 64 // a power of two
	crowdSize   = 64 // some 4000 keys of a group
	// crowdSpan is how long the keys of a group count together.
	crowdSpan = 10 * time.Minute
	// maxCrowdGroups bounds the groups that are counted, and maxCrowdNotices those that notices name.
	maxCrowdGroups  = 1024
	maxCrowdNotices = 8
)

func newCrowds() crowds {
	return crowds{seed: maphash.MakeSeed(), groups: map[string]map[uint64]struct{}{}, told: map[string]bool{}}
}

// saw counts a key, and reports whether its group is a crowd that no notice has named.
func (c *crowds) saw(key string) (crowd bool) {
	group := quota.Group(key)
	if len(group) == len(key) { // it has no other keys
		return false
	}
	h := maphash.String(c.seed, key)
	return h%crowdSample == 0 && c.count(group, h)
}

// count counts a key of the sample.
func (c *crowds) count(group string, h uint64) (crowd bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := time.Now(); now.Sub(c.since) > crowdSpan {
		c.since = now
		clear(c.groups)
	}
	keys := c.groups[group]
	if keys == nil {
		if c.told[group] || len(c.told) == maxCrowdNotices {
			return false
		}
		c.makeRoom()
		keys = map[uint64]struct{}{}
		c.groups[group] = keys
	}
	keys[h] = struct{}{}
	if len(keys) < crowdSize {
		return false
	}
	delete(c.groups, group)
	c.told[group] = true
	return true
}

// makeRoom forgets small groups if there are too many.
func (c *crowds) makeRoom() {
	for few := 2; len(c.groups) >= maxCrowdGroups; few *= 2 {
		maps.DeleteFunc(c.groups, func(_ string, keys map[uint64]struct{}) bool { return len(keys) < few })
	}
}

// counts counts a key of a cluster, and gives notice of a crowd.
func (s *Store) counts(key string) {
	if s.cluster && s.crowds.saw(key) {
		s.notice("group", fmt.Sprintf("thousands of keys begin with the segment %.80q and are in one slot of the cluster, so one node does their work; "+
			"accepted: the segment that differs first, or one segment, and a limit for each kind of key", quota.Group(key)))
	}
}
