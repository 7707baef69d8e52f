"""The words that the built-in captions are made of, by what they can stand for in a sentence."""

ANIMALS = """
cat dog horse cow sheep goat pig rabbit mouse rat hamster squirrel fox wolf bear panda lion tiger leopard
cheetah elephant giraffe zebra hippo rhino monkey gorilla kangaroo koala deer moose camel donkey llama otter
seal whale dolphin shark turtle tortoise frog toad lizard snake crocodile dinosaur dragon unicorn owl eagle
hawk crow raven sparrow robin parrot peacock penguin flamingo swan duck goose chicken rooster turkey hen
pigeon seagull hummingbird butterfly bee ladybug dragonfly spider ant beetle snail crab lobster octopus
jellyfish starfish goldfish salmon puppy kitten lamb calf foal corgi poodle bulldog husky labrador beagle
dachshund chihuahua terrier retriever tabby bat beaver raccoon skunk hedgehog badger meerkat lemur sloth
buffalo bison pony mule ferret chipmunk walrus caterpillar moth grasshopper
"""

PEOPLE = """
man woman boy girl child baby toddler teenager person couple family crowd gentleman lady bride groom father
mother grandfather grandmother brother sister son daughter uncle aunt friend neighbor student teacher doctor
nurse surgeon dentist scientist engineer farmer fisherman baker chef cook waiter waitress bartender barista
butcher carpenter plumber mechanic painter photographer musician singer dancer actor actress model writer poet
journalist lawyer judge detective policeman policewoman firefighter soldier sailor pilot astronaut driver
cyclist runner swimmer skier surfer skateboarder climber hiker boxer wrestler gymnast goalkeeper referee coach
athlete king queen prince princess knight warrior samurai ninja pirate cowboy wizard witch clown magician
mermaid angel superhero robot zombie vampire monk nun priest librarian tailor hairdresser gardener builder
shopkeeper businessman businesswoman secretary tourist traveler passenger pedestrian violinist pianist
guitarist drummer ballerina
"""

VEHICLES = """
car truck bus van taxi motorcycle bicycle scooter tram train locomotive subway airplane helicopter jet boat
sailboat ship yacht canoe kayak ferry submarine tractor bulldozer excavator ambulance convertible sedan jeep
minivan limousine racecar rocket spaceship spacecraft balloon skateboard sled wagon carriage cart trailer
camper caravan
"""

FURNITURE = """
chair table sofa couch armchair bed desk bookshelf cabinet wardrobe dresser drawer bench stool nightstand lamp
chandelier mirror rug carpet curtain pillow cushion blanket mattress crib cradle fireplace bathtub sink toilet
shower faucet refrigerator oven stove microwave dishwasher toaster blender kettle teapot coffee_maker vacuum
fan heater clock vase candle shelf hammock
"""

THINGS = """
cup mug glass plate bowl fork knife spoon bottle jar pan pot basket box bag backpack suitcase purse wallet
handbag umbrella key lock book notebook magazine newspaper envelope letter stamp postcard map pen pencil
crayon brush eraser ruler scissors stapler calculator laptop computer keyboard monitor printer tablet phone
telephone camera tripod television radio speaker headphones microphone remote battery charger flashlight
lantern lightbulb toy doll puppet puzzle kite ball yo-yo teddy_bear rubber_duck figurine statue sculpture
trophy medal ring necklace bracelet earring watch brooch crown tiara sword shield helmet armor bow arrow axe
hammer screwdriver wrench saw drill nail screw shovel rake ladder bucket hose wheelbarrow rope chain hook
anchor compass telescope microscope binoculars globe flag banner sign poster calendar painting frame easel
palette typewriter sewing_machine needle thread button zipper ribbon gift card candlestick matchbox ashtray
pipe cigar lighter soap towel sponge toothbrush comb razor perfume lipstick mask wig dice chess_set
playing_card guitar piano violin cello flute trumpet saxophone drum harp accordion banjo ukulele bell whistle
football basketball baseball volleyball racket surfboard snowboard skis skates glove bat dumbbell treadmill
tent sleeping_bag campfire fishing_rod net cage birdhouse mailbox fountain gravestone wheel tire engine gear
spring magnet coin banknote crystal diamond gemstone pearl seashell feather bone skull shell stone brick log
stick leaf acorn pinecone snowman scarecrow jack-o-lantern
"""

CLOTHES = """
shirt t-shirt blouse sweater hoodie jacket coat raincoat vest suit tuxedo dress gown skirt jeans trousers
shorts leggings pajamas swimsuit bikini uniform apron scarf shawl tie hat cap beanie beret turban helmet
gloves mittens socks stockings shoes boots sandals sneakers slippers heels belt sunglasses glasses kimono robe
costume cardigan overalls
"""

FOODS = """
apple banana orange lemon lime grape strawberry blueberry raspberry cherry peach pear plum pineapple mango
kiwi watermelon melon coconut avocado tomato potato carrot onion garlic pepper cucumber lettuce cabbage
broccoli cauliflower spinach mushroom corn pumpkin eggplant zucchini bread baguette croissant bagel muffin
donut cupcake cake cheesecake pie tart cookie brownie waffle pancake biscuit pretzel sandwich burger hotdog
pizza pasta spaghetti lasagna noodle rice sushi dumpling taco burrito salad soup stew curry steak chicken
bacon sausage ham omelette egg cheese butter yogurt honey jam chocolate candy lollipop popcorn chips ice_cream
milkshake smoothie juice lemonade coffee tea cocktail beer wine champagne water milk
"""

DISHES = """
soup stew curry salad casserole sandwich wrap pasta pizza pie roast stir-fry risotto omelette tart bowl sauce
chili kebab
"""

PLANTS = """
rose tulip daisy sunflower lily orchid lavender daffodil poppy lotus hydrangea peony carnation dandelion iris
violet fern ivy moss cactus succulent bonsai bamboo palm oak pine maple birch willow cherry_tree apple_tree
bush hedge vine weed grass wheat bouquet wreath flower tree shrub seedling
"""

BUILDINGS = """
house cottage cabin mansion castle palace tower skyscraper apartment hotel hospital school university library
museum theater cinema church cathedral chapel mosque temple shrine pagoda monastery lighthouse windmill barn
farmhouse stable shed garage warehouse factory shop store supermarket bakery restaurant cafe pub bank office
station airport bridge tunnel dam stadium gym pool prison fortress ruin pyramid tent igloo treehouse
greenhouse observatory gazebo villa bungalow courthouse
"""

LANDSCAPES = """
mountain hill valley canyon cliff cave volcano glacier desert dune oasis forest jungle rainforest meadow field
pasture vineyard orchard garden park lake pond river stream creek waterfall swamp marsh beach coast shore
island lagoon reef ocean sea bay harbor fjord prairie savanna tundra countryside village town city skyline
street alley road highway path trail square plaza market playground
"""

PLACES = """
beach|at the beach|on the beach|in the park|in a park|in the garden|in the forest|in the woods|in the snow|
in the rain|in the desert|in the mountains|on a mountain|by the lake|near a river|under a bridge|on a bridge|
in the city|in a small town|on the street|on a busy street|on the sidewalk|in an alley|at the market|
in a supermarket|in a shop window|in the kitchen|in a bathroom|in a bedroom|in the living room|in an office|
in a classroom|in a library|in a museum|at the airport|at a train station|on a bus|in a hospital|
at a restaurant|in a cafe|at a bar|on a stage|at a concert|at a party|at a wedding|on a farm|in a field|
in a meadow|in the jungle|on an island|on a boat|at sea|underwater|in the sky|in outer space|on the moon|
on a rooftop|on a balcony|on the porch|in the backyard|in front of a house|next to a window|by the fireplace|
on the floor|on a rug|on a table|on a wooden table|on a chair|on a couch|on a bed|on a shelf|on a bench|
on a rock|on a tree branch|on the grass|in a basket|in a box|in a glass jar|in a vase|in a bowl|on a plate|
against a white background|on a black background|on a blue background|against a brick wall|against a blue sky|
in a studio|in an empty room|in a parking lot|at a gas station|on the highway|on a dirt road|
at a construction site|in a factory|in a garage|at the zoo|in an aquarium|at the playground|
in a swimming pool|at the gym|on a football field|on a tennis court|in a stadium|at a castle|in an old church|
on top of a hill|at the edge of a cliff|in a cave|beside a waterfall|in a tent|around a campfire|in paris|
in london|in new york|in tokyo|in rome|in venice|in san francisco|in los angeles|in chicago|in berlin|
in amsterdam|in barcelona|in istanbul|in cairo|in india|in china|in japan|in mexico|in brazil|in africa|
in australia|in canada|in russia|in iceland|in norway|in scotland|in ireland|in spain|in greece|in italy|
in germany|in france|in thailand|in california|in texas|in hawaii|in alaska|in florida|in england|
in switzerland|in the middle of nowhere|in heaven|in a fairy tale|at school|at home|at work|outdoors|indoors
"""

TIMES = """
at night|at sunset|at sunrise|at dawn|at dusk|at noon|in the morning|in the evening|in the afternoon|
at midnight|in winter|in summer|in spring|in autumn|on a sunny day|on a rainy day|on a cloudy day|
on a foggy morning|on a snowy day|during a storm|during the day|on christmas|on halloween|at easter|
on new year's eve|on valentine's day|after the rain|before the storm|in 2019|in the 1920s|in the 1950s|
in the 1980s|in the middle ages|on monday|on friday|on the weekend|in january|in april|in july|in october|
in december
"""

COLOURS = """
red blue green yellow orange purple pink brown black white gray silver golden turquoise teal beige cream navy
maroon crimson scarlet violet indigo magenta lime olive rainbow-colored multicolored dark-green light-blue
pale-pink bright-red
"""

MATERIALS = """
wooden metal glass plastic leather cotton wool silk paper cardboard stone marble concrete brick ceramic
porcelain clay steel iron copper bronze brass gold silver rubber velvet denim felt knitted crocheted woven
wicker crystal inflatable
"""

ADJECTIVES = """
big small large little tiny huge giant tall short long wide narrow thick thin round square flat sharp soft
hard smooth rough heavy light old new ancient modern vintage antique retro rusty broken clean dirty dusty
muddy wet dry hot cold warm cool frozen bright dark shiny glossy matte transparent colorful pale plain striped
spotted dotted checkered patterned floral decorated painted carved handmade homemade beautiful pretty cute
adorable lovely ugly scary creepy spooky weird strange funny silly famous rare common cheap expensive luxury
elegant fancy simple minimal rustic cozy comfortable empty full open closed hidden lost abandoned haunted
magical mysterious enchanted futuristic electric mechanical automatic portable foldable waterproof perfect
favorite typical traditional royal sacred toy miniature oversized unfinished identical twin wrapped burning
melting floating glowing upside-down
"""

ANIMATE_ADJECTIVES = """
quiet loud fast slow strong weak brave lazy sleepy tired angry sad happy cheerful excited surprised worried
shy proud curious playful gentle friendly fluffy furry hairy fat skinny muscular young elderly wild tame
hungry newborn grumpy clever clumsy noisy baby
"""

FOOD_ADJECTIVES = """
fresh rotten organic healthy delicious spicy sweet sour bitter salty crispy creamy juicy raw grilled fried
baked roasted steamed smoked stuffed sliced chopped mashed boiled pickled glazed frozen homemade vegan ripe
tasty warm cold crunchy leftover gluten-free
"""

PERSON_ADJECTIVES = """
young old elderly happy sad angry smiling laughing crying tired handsome beautiful pretty tall short blond
bearded bald pregnant barefoot tattooed wet injured busy lonely homeless rich poor famous serious surprised
excited worried sleepy muscular middle-aged
"""

ANIMAL_VERBS = """
sleeping|sitting|standing|running|jumping|walking|eating|drinking water|playing|playing with a ball|
chasing a butterfly|hiding|looking at the camera|looking out of a window|lying down|swimming|flying|
climbing a tree|catching a fish|yawning|barking|growling|wearing a hat|wearing a bow tie|wearing sunglasses|
rolling in the mud|digging a hole|stretching|licking its paw|waiting for food|peeking out of a box|
riding a skateboard|looking up|staring at its reflection|shaking off water|with its mouth open|with big eyes|
with its tongue out|with her babies|howling at the moon
"""

PERSON_VERBS = """
walking|running|sitting|standing|sleeping|dancing|singing|laughing|crying|smiling|thinking|waiting|working|
studying|cooking dinner|baking a cake|eating breakfast|eating an ice cream|drinking coffee|
drinking a glass of wine|reading a book|reading the newspaper|writing a letter|painting a picture|drawing|
taking a photo|taking a selfie|talking on the phone|typing on a laptop|listening to music|playing the guitar|
playing the piano|playing video games|playing chess|playing cards|playing soccer|playing basketball|
playing tennis|playing golf|playing baseball|playing ice hockey|throwing a frisbee|flying a kite|
riding a bike|riding a horse|riding a motorcycle|driving a car|paddling a canoe|surfing a wave|
skiing down a slope|snowboarding|skateboarding|ice skating|swimming|diving|fishing|hiking|climbing a wall|
lifting weights|doing yoga|meditating|praying|washing the dishes|doing laundry|cleaning the floor|vacuuming|
watering plants|mowing the lawn|picking apples|planting a tree|feeding the ducks|walking the dog|
holding a baby|holding hands|holding an umbrella|holding a sign|carrying a heavy box|pushing a stroller|
pulling a suitcase|opening a present|blowing out candles|cutting the cake|brushing his teeth|combing her hair|
getting a haircut|putting on makeup|trying on shoes|shopping for clothes|waiting for the bus|
crossing the street|climbing the stairs|repairing a bicycle|building a house|painting a wall|chopping wood|
giving a speech|shaking hands|hugging|kissing|waving goodbye|pointing at a map|looking through binoculars|
looking into a mirror|wearing a suit|wearing headphones|leaning against a wall|jumping into the water|
celebrating a birthday|watching television|playing with a dog|playing in the sand|building a sandcastle|
having a picnic|telling a story|teaching a class|examining a patient|fighting a dragon|casting a spell|
walking on the moon|rescuing a kitten
"""

STYLES = """
oil painting|watercolor painting|acrylic painting|pencil drawing|pencil sketch|charcoal drawing|ink drawing|
pen and ink illustration|children's book illustration|comic book page|cartoon|anime drawing|manga panel|
pixel art|3d render|low poly model|clay sculpture|marble statue|wood carving|paper cutout|origami|collage|
mosaic|stained glass window|tapestry|embroidery|cross stitch pattern|graffiti|mural|tattoo design|logo|icon|
vector illustration|flat design|coloring page|line art|doodle|caricature|portrait|landscape painting|
still life|abstract painting|impressionist painting|cubist painting|surrealist painting|pop art print|
art deco poster|art nouveau poster|japanese woodblock print|chinese ink painting|renaissance fresco|
medieval manuscript|cave painting|propaganda poster|movie poster|book cover|album cover|concept art|
matte painting|blueprint|technical drawing|map|infographic|diagram|engraving|etching|lithograph|screen print|
linocut|digital painting|storyboard|sticker|emoji|wallpaper|greeting card|t-shirt design
"""

PHOTOS = """
photo|photograph|picture|image|snapshot|close-up photo|close up|macro shot|portrait|black and white photo|
old photograph|polaroid|aerial view|aerial photograph|drone shot|panorama|wide angle shot|low angle view|
side view|front view|rear view|top view|cropped photo|blurry photo|bad photo|good photo|nice photo|dark photo|
bright photo|low resolution photo|high resolution photo|professional photograph|studio shot|product photo|
stock photo|candid shot|selfie|film still|screenshot|long exposure|silhouette|double exposure|satellite image|
x-ray|night shot|travel photo|wedding photo|fashion photograph|food photography|wildlife photograph|
macro photograph|street photograph|passport photo|postcard|close-up|rendering|view
"""

QUALITIES = """
highly detailed|sharp focus|shallow depth of field|bokeh|soft light|natural light|dramatic lighting|
golden hour|backlit|studio lighting|cinematic|35mm film|50mm lens|f/1.8|4k|8k|hdr|high contrast|low contrast|
muted colors|vivid colors|pastel colors|warm tones|black and white|sepia|grainy|blurred background|
white background|isolated on white|symmetrical|minimalist|full body|centered|out of focus|motion blur|
award winning|masterpiece|intricate details|photorealistic|hyperrealistic|vintage style|by night|
cartoon style|unreal engine|wide angle|fisheye|overexposed|from above|from behind|from below|from the side|
in the distance|no people|copy space
"""

RELATIONS = """
next to|beside|behind|in front of|on top of|under|above|below|inside|near|left of|right of|
between two trees and|leaning on|made of|surrounded by|covered with|filled with|and|with|without|looking at|
holding|facing|around|against|opposite|together with|far from|full of|painted on|reflected in|hanging from|
tied to|across from
"""

NUMBERS = """
two three four five six seven eight nine ten twelve twenty a_hundred several many some a_few various assorted
"""

TOPICS = """
love peace war freedom justice truth hope fear death life time dream memory music art science nature history
education health money business marketing technology politics religion philosophy psychology mathematics
physics chemistry biology astronomy medicine law economy energy climate environment weather travel adventure
sport fitness fashion beauty food cooking gardening photography architecture design poetry literature theater
dance cinema family friendship marriage childhood parenting retirement work leadership teamwork success
failure happiness sadness anger jealousy loneliness courage wisdom luck magic christmas halloween easter
thanksgiving birthday wedding funeral anniversary graduation holiday vacation summer winter autumn spring
internet security privacy data cloud network software hardware game strategy competition championship election
revolution industry agriculture transport logistics insurance investment taxes trade banking innovation
research discovery exploration safety accident fire flood earthquake hurricane tornado lightning thunder
rainbow eclipse galaxy nebula planet comet universe gravity evolution genetics virus vaccine surgery therapy
nutrition diet sleep yoga meditation mindfulness spirituality heaven hell mythology folklore legend
"""

PHRASES = """
happy birthday|merry christmas|happy new year|i love you|thank you|good morning|good night|welcome home|
for sale|open|closed|stop|exit|no smoking|keep calm and carry on|hello world|just married|best dad ever|
home sweet home|the end|once upon a time|free shipping|50% off|sold out|coming soon|under construction|
do not disturb|danger|fresh fish|coffee|pizza|taxi|police|made with love|live laugh love|never give up|
be yourself|dream big|follow your heart|have a nice day|get well soon|it's a girl!|it's a boy!|we are hiring|
what's new?|how are you?|don't panic|let's go!|you're the best|they're here|i'm fine
"""

EVERYDAY = """
how to make {a}|how to draw {a}|how to clean {a}|how to choose the best {n}|
what is the difference between {a} and {a}?|the best {n} of 2020|top 10 {ns} for beginners|
10 things you didn't know about {ns}|why i love my {n}|{a} for sale, only $25|buy {ns} online, free shipping|
{adj} {n} with {adj} {n}, set of 4|{n} - size 12|new {n} (2018 model)|{ns} & {ns}|
everything you need to know about {ns}|my {n} is better than your {n}|i want {a}|look at this {adj} {n}!|
where can i find {a}?|is this {a} or {a}?|this is not {a}|there are no {ns} here|there is {a} in my {n}|
she said she wanted {a}|he gave her {a}|they were looking for {a}|we have never seen such {a}|
it looks like {a}|one of the most {adj} {ns} in the world|the history of the {n}|
the {n} that changed everything|an introduction to {topic}|{topic} and {topic}|the future of {topic}|
the art of {topic}|a book about {topic}|symbol of {topic}|quotes about {topic}|{topic} concept|
world {topic} day|{topic} for dummies|the importance of {topic} in {topic}|a lecture on {topic}|
national museum of {topic}|department of {topic}|{adj} {topic}|{topic} explained|how {topic} works|
5 tips for better {topic}|{n}, {n}, and {n}|{n} vs {n}|{n} number 3|who stole the {n}?|
we went to see the {n} yesterday|my grandmother's old {n}|the {n}'s shadow|don't forget your {n}|
you can't eat {a}|let me show you the {n}|could you bring me {a}, please?|every {n} has its own story|
another {n} arrived today|both {ns} are {adj}|neither {a} nor {a}|it's just {a}|that's what i call {a}|
all {ns} are {adj}|most {ns} aren't {adj}|{name} and {name} {doing} {a}|{name}'s {adj} {n}|
{name} the {animal}|{name} loves {sport}|dear {name}, thank you for the {n}|{name} is {doing} {a}|
how {name} learned {sport}|{nation} {n}|{adj} {nation} {n}|traditional {nation} {food}|{nation} {person}|
a {nation} flag on {a}|the {body} of {a}|close up of the {body} of {a}|his {body} and her {body}|{adj} {body}|
{a} with {adj} {body}s|{sport} {n}|a {sport} match|{person} {doing} {a} during {sport}|
{sport} lessons for kids|the rules of {sport}|{doing} {a} and {a}|{doing} {a} with {name}|
{person} {doing} {a}|tips for {doing} {ns}|{doing} {ns} is fun|stop {doing} my {n}!|{person} after {doing} {a}
"""

NAMES = """
emma olivia sophia anna maria laura julia sarah emily alice lucy grace rose lily hannah eva nina clara rachel
jessica jennifer linda susan karen nancy betty helen sandra ashley kate mary elizabeth victoria charlotte
james john robert michael david william richard joseph thomas charles daniel matthew mark paul peter george
henry jack oliver harry sam max leo ben tom adam luke noah liam ethan alexander martin simon kevin brian eric
steve frank carlos diego pablo ahmed ali omar yuki hiro chen wei ravi priya ivan olga
"""

NATIONS = """
american british english scottish irish french german italian spanish portuguese dutch swiss austrian polish
russian greek turkish swedish norwegian danish finnish icelandic chinese japanese korean vietnamese thai
indian persian arab egyptian african moroccan mexican brazilian cuban canadian australian hawaiian european
asian victorian roman viking medieval
"""

BODY = """
head face hair forehead eyebrow eye ear nose cheek mouth lip tooth tongue chin beard neck shoulder arm elbow
wrist hand finger thumb nail chest back stomach waist hip leg knee ankle foot toe heel skin bone heart brain
lung muscle paw tail wing beak horn hoof claw whisker fin mane shadow reflection footprint
"""

SPORTS = """
soccer football basketball baseball tennis golf hockey volleyball rugby cricket badminton table_tennis
swimming diving surfing sailing rowing skiing snowboarding ice_skating figure_skating cycling running marathon
jogging hiking climbing boxing wrestling karate judo fencing archery gymnastics ballet yoga weightlifting
bowling billiards darts chess poker fishing hunting horse_racing motor_racing skateboarding parkour
paragliding
"""

ACTIONS = """
buying selling making building breaking fixing painting cleaning washing opening closing holding carrying
lifting pushing pulling throwing catching dropping finding hiding stealing giving taking bringing sending
receiving wrapping unwrapping cutting burning decorating designing drawing sketching photographing filming
watching studying examining inspecting measuring weighing counting collecting sorting stacking moving hanging
climbing riding driving chasing following feeding training protecting rescuing admiring imagining describing
ignoring avoiding licking smelling tasting touching squeezing folding tying polishing assembling repairing
restoring replacing unloading borrowing returning choosing comparing
"""

MORE = """
alphabet number letter word sentence story song melody dancefloor parade festival carnival circus fireworks
ceremony meeting conference interview exhibition auction picnic barbecue breakfast lunch dinner dessert snack
menu receipt ticket passport license certificate contract document report chart graph pattern texture
background border corner edge shape circle triangle spiral star heart cross square symbol logo brand label
barcode sticker badge ribbon flame smoke ash spark bubble foam wave splash drop puddle ice snowflake icicle
hail mist haze shadow sunlight moonlight beam laser hologram machine device gadget robot_arm satellite antenna
cable plug switch socket panel circuit chip sensor tool kit parts pipe tank pump valve bolt pulley lever crane
conveyor workshop laboratory kitchenware cutlery tableware furniture jewelry clothing luggage groceries
vegetables fruits spices herbs seeds nuts grains flour sugar salt oil vinegar mustard ketchup sauce gravy
syrup cinnamon vanilla mint basil ginger toy_car dollhouse sandbox swing slide carousel ferris_wheel
roller_coaster rollercoaster maze labyrinth staircase elevator escalator doorway gate fence wall roof chimney
ceiling floor window door balcony porch terrace courtyard basement attic column arch dome sidewalk crosswalk
traffic_light traffic_jam billboard fire_hydrant trash_can parking_meter bus_stop stop_sign bench_press oxygen
carbon atom molecule cell microbe fossil skeleton mummy ghost monster alien fairy elf dwarf giant troll goblin
demon god goddess hero villain mascot avatar character crowd audience queue nest hive web egg_carton pet herd
flock swarm pack beast creature insect reptile bird fish mammal species
"""
